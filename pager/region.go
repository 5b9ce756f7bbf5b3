package pager

import (
	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

// A region is memory with one source. Events split what was one Region into
// several: they share the states of their pages.
type region struct {
	uffd.Range
	pageSize    uint64
	source      source.Source // nil: zeros
	offset      int64         // of Start in source
	memory      []byte        // the pager's mapping of the same memory, or nil
	beforeWrite func(uffd.Range)

	home   int // which of the Regions it is of
	states *pages
	first  uint64 // of states, for Start

	data   extent // of source, not to be asked for again
	around around
}

func (r *region) pages() uint64               { return r.Len / r.pageSize }
func (r *region) index(a uffd.Addr) uint64    { return uint64(a-r.Start) / r.pageSize }
func (r *region) state(i uint64) state        { return r.states.get(r.first + i) }
func (r *region) setState(i uint64, s state)  { r.states.set(r.first+i, s) }
func (r *region) sourceOffset(i uint64) int64 { return r.offset + int64(i*r.pageSize) }
func (r *region) memoryAt(i, n uint64) []byte { return r.memory[i*r.pageSize:][:n*r.pageSize] }
func (r *region) writeProtected() bool        { return r.beforeWrite != nil }
func (r *region) page(i uint64) uffd.Range    { return r.span(i, 1) }
func (r *region) span(i, n uint64) uffd.Range {
	return uffd.Range{Start: r.Start + uffd.Addr(i*r.pageSize), Len: n * r.pageSize}
}

func overlap(a, b uffd.Range) bool { return a.Start < b.End() && b.Start < a.End() }

// regions is sorted by address, without overlaps.
type regions []*region

// find returns the region that holds a, or nil.
func (rs regions) find(a uffd.Addr) *region {
	i := rs.after(a)
	if i > 0 && rs[i-1].Contains(a) {
		return rs[i-1]
	}
	return nil
}

// after returns the index of the first region that starts behind a.
func (rs regions) after(a uffd.Addr) int {
	low, high := 0, len(rs)
	for low < high { // as sort.Search, which calls a function for each step
		if mid := (low + high) / 2; rs[mid].Start > a {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return low
}

func (rs *regions) insert(r *region) {
	i := rs.after(r.Start)
	*rs = append(*rs, nil)
	copy((*rs)[i+1:], (*rs)[i:])
	(*rs)[i] = r
}

// split makes a the start of a region, if it lies within one.
func (rs *regions) split(a uffd.Addr) {
	r := rs.find(a)
	if r == nil {
		return
	}
	n := r.index(a)
	if n == 0 {
		return
	}
	rest := *r
	rest.Range = r.Skip(int64(n * r.pageSize))
	rest.offset = r.sourceOffset(n)
	rest.first += n
	if r.memory != nil {
		rest.memory = r.memory[n*r.pageSize:]
	}
	r.Len = n * r.pageSize
	rs.insert(&rest)
}

// in returns the regions in r, after splitting those that reach out of it.
func (rs *regions) in(r uffd.Range) regions {
	rs.split(r.Start)
	rs.split(r.End())
	i := rs.after(r.Start)
	if i > 0 && (*rs)[i-1].Start == r.Start {
		i--
	}
	j := i
	for j < len(*rs) && (*rs)[j].Start < r.End() {
		j++
	}
	return (*rs)[i:j]
}

// apply does what an event says about memory.
func (rs *regions) apply(m *uffd.Msg) {
	if r, ok := m.Remap(); ok {
		rs.remap(r)
	}
	if r, ok := m.Remove(); ok {
		rs.remove(r)
	}
	if r, ok := m.Unmap(); ok {
		rs.unmap(r)
	}
}

// remove notes that the pages in r were discarded. Of a huge page of which that is
// a part the rest is as before.
func (rs *regions) remove(r uffd.Range) {
	for _, part := range *rs {
		if !overlap(part.Range, r) {
			continue
		}
		first := part.index(max(part.Start, r.Start) + uffd.Addr(part.pageSize-1))
		end := part.index(min(part.End(), r.End()))
		for i := first; i < end; i++ {
			part.setState(i, removed)
		}
	}
}

// unmap drops what is in r.
func (rs *regions) unmap(r uffd.Range) {
	gone := rs.in(r)
	if len(gone) == 0 {
		return
	}
	i := rs.after(gone[0].Start) - 1
	*rs = append((*rs)[:i:i], (*rs)[i+len(gone):]...)
}

// remap moves what is at m.From to m.To. What stays behind reads zeros, unless it
// is shared, until the event comes that unmaps it: with MREMAP_DONTUNMAP none
// does. What has grown reads zeros, too.
func (rs *regions) remap(m uffd.Remap) {
	if m.Len == 0 {
		return
	}
	rs.unmap(uffd.Range{Start: m.To, Len: m.Len})
	old := append(regions(nil), rs.in(uffd.Range{Start: m.From, Len: m.Len})...)
	for _, r := range old {
		moved := *r
		moved.Start = m.To + (r.Start - m.From)
		rs.insert(&moved)
		if r.memory != nil { // the file's contents, which both places show
			continue
		}
		*r = region{Range: r.Range, pageSize: r.pageSize, beforeWrite: r.beforeWrite, home: r.home, first: r.first}
		r.states = newPages(r.first + r.pages())
	}
	if len(old) == 0 {
		return
	}
	last := old[len(old)-1]
	if used := uint64(last.End() - m.From); used < m.Len && last.memory == nil {
		grown := &region{
			Range:       uffd.Range{Start: m.To + uffd.Addr(used), Len: m.Len - used},
			pageSize:    last.pageSize,
			beforeWrite: last.beforeWrite,
			home:        last.home,
		}
		grown.states = newPages(grown.pages())
		rs.insert(grown)
	}
}

// twins calls f with where else pages of r are mapped: MREMAP_DONTUNMAP leaves
// shared memory at two places, which have the states of the pages in common.
func (rs regions) twins(r uffd.Range, f func(uffd.Range)) {
	for _, part := range rs {
		if part.memory == nil || !overlap(part.Range, r) {
			continue
		}
		first := part.first + part.index(max(part.Start, r.Start))
		end := part.first + part.index(min(part.End(), r.End())-1) + 1
		for _, other := range rs {
			if other == part || other.states != part.states {
				continue
			}
			from, to := max(first, other.first), min(end, other.first+other.pages())
			if from < to {
				f(other.span(from-other.first, to-from))
			}
		}
	}
}

// clone is the memory of a child at the time of the fork.
func (rs regions) clone() regions {
	states := make(map[*pages]*pages)
	child := make(regions, len(rs))
	for i, r := range rs {
		c := *r
		if states[r.states] == nil {
			states[r.states] = r.states.clone()
		}
		c.states = states[r.states]
		child[i] = &c
	}
	return child
}

// reset gives up the pages in r that were being read.
func (rs regions) reset(r uffd.Range) {
	for _, part := range rs {
		if !overlap(part.Range, r) {
			continue
		}
		end := min(part.End(), r.End())
		for i := part.index(max(part.Start, r.Start)); i <= part.index(end-1); i++ {
			if part.state(i) == reading {
				part.setState(i, absent)
			}
		}
	}
}
