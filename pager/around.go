package pager

import "github.com/go-uffd/uffd/source"

// around is how many pages the faults of a region bring in. A fault that borders
// on what an earlier one brought doubles the number, any other halves it.
type around struct {
	window uint64
	recent [4]struct{ first, end uint64 } // in the order of time, from next on
	next   int
}

// size returns how many pages the fault of page i may bring in.
func (a *around) size(i, limit uint64) uint64 {
	borders := false
	for _, w := range a.recent {
		if w.first < w.end && (i == w.end || i+1 == w.first) {
			borders = true
		}
	}
	if borders {
		a.window = min(a.window*2, limit)
	} else {
		a.window = max(a.window/2, 1)
	}
	return a.window
}

func (a *around) brought(first, n uint64) {
	a.recent[a.next].first, a.recent[a.next].end = first, first+n
	a.next = (a.next + 1) % len(a.recent)
}

// window returns the pages that a fault of page i is to bring in: from the
// aligned block around it those next to it that are absent, and alike to the
// source.
func (r *region) window(i, limit uint64) (first, n uint64) {
	defer func() { r.around.brought(first, n) }()
	size := uint64(1)
	if limit > 1 {
		size = r.around.size(i, limit)
	}
	if size == 1 {
		return i, 1
	}
	page := uint64(r.Start)/r.pageSize + i // blocks are aligned in memory
	low := i - min(i, page%size)
	high := min(i+size-page%size, r.pages())

	kind, pages := r.run(i)
	high = min(high, i+max(pages, 1))
	end := i + 1
	for end < high && r.state(end) == absent {
		end++
	}
	if pages == 0 {
		return i, 1
	}
	first = i
	for first > low && r.state(first-1) == absent {
		first--
	}
	if first < i {
		k, pages := r.run(first)
		if k != kind || first+pages <= i {
			first = i
		} else {
			end = min(end, first+pages)
		}
	}
	return first, end - first
}

// run returns what the source has for page i, and for how many whole pages.
func (r *region) run(i uint64) (source.Kind, uint64) {
	if r.source == nil {
		return source.Hole, r.pages() - i
	}
	kind, n := source.RunAt(r.source, r.sourceOffset(i))
	return kind, uint64(n) / r.pageSize
}

// aroundPages returns how many pages a fault may bring in: a power of two.
func (c *Client) aroundPages(pageSize uint64) uint64 {
	limit := uint64(max(c.pager.FaultAround, 0))
	if limit == 0 {
		limit = 64 << 10
	}
	n := uint64(1)
	for 2*n*pageSize <= limit {
		n *= 2
	}
	return n
}
