//go:build linux

package main

import (
	"fmt"
	"path/filepath"
	"sort"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/vma"
	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// A snapshot is the memory of a task in one directory of images.
type snapshot struct {
	dir     string
	extents []extent
	pages   *source.File // nil if there are none
	parent  *snapshot    // nil if nothing is in it
}

// maxParents is how many images may be based on one another.
const maxParents = 1000

// openSnapshot reads where the pages of a task are.
func openSnapshot(dir string, pid int32, depth int) (*snapshot, error) {
	if depth > maxParents {
		return nil, fmt.Errorf("%s: more than %d parents: does the link named parent lead in a circle?", dir, maxParents)
	}
	extents, pages, err := readPagemap(dir, pid)
	if err != nil {
		return nil, err
	}
	s := &snapshot{dir: dir, extents: extents}
	var all uint32
	var size int64
	for _, e := range extents {
		all |= e.flags
		if e.flags&present != 0 {
			size = e.offset + int64(e.end-e.start)
		}
	}
	if all&present != 0 {
		if s.pages, err = source.OpenFile(pages); err != nil {
			return nil, err
		}
		if s.pages.Size() < size {
			return nil, fmt.Errorf("%s has %d bytes, and should have %d", pages, s.pages.Size(), size)
		}
	}
	if all&inParent != 0 {
		if s.parent, err = openSnapshot(filepath.Join(dir, "parent"), pid, depth+1); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// locate calls use with the parts of [start, end) and where each of them is.
func (s *snapshot) locate(start, end uint64, use func(start, end uint64, pages *source.File, offset int64)) error {
	i := sort.Search(len(s.extents), func(i int) bool { return s.extents[i].end > start })
	for start < end {
		if i == len(s.extents) || s.extents[i].start > start {
			return fmt.Errorf("%s: the page at %#x is missing", s.dir, start)
		}
		e := s.extents[i]
		part := min(end, e.end)
		switch {
		case e.flags&present != 0:
			use(start, part, s.pages, e.offset+int64(start-e.start))
		case e.flags&inParent != 0:
			if err := s.parent.locate(start, part, use); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s: the page at %#x is not in the image, but was left with the process that was dumped "+
				"(dump --lazy-pages): only criu lazy-pages --page-server gets it from there", s.dir, start)
		}
		start = part
		i++
	}
	return nil
}

// lazyRegions returns the memory of a task that restore leaves to us. What it does
// not contain, restore has filled, or it is zeros.
func lazyRegions(dir string, pid int32) ([]pager.Region, error) {
	s, err := openSnapshot(dir, pid, 0)
	if err != nil {
		return nil, err
	}
	mappings, err := readMappings(dir, pid)
	if err != nil {
		return nil, err
	}
	var regions []pager.Region
	for _, e := range s.extents {
		if e.flags&lazy == 0 {
			continue
		}
		// The kernel installs no pages across the border of two mappings.
		for start := e.start; start < e.end; {
			m, err := mappingAt(mappings, start)
			if err != nil {
				return nil, fmt.Errorf("%s: task %d: %w", dir, pid, err)
			}
			end := min(e.end, m.GetEnd())
			err = s.locate(start, end, func(start, end uint64, pages *source.File, offset int64) {
				regions = append(regions, pager.Region{
					Range:  uffd.Range{Start: uffd.Addr(start), Len: end - start},
					Source: pages,
					Offset: offset,
				})
			})
			if err != nil {
				return nil, err
			}
			start = end
		}
	}
	return regions, nil
}

// mappingAt returns the mapping that holds an address. It has to be of the kind
// that restore registers.
func mappingAt(mappings []*vma.VmaEntry, addr uint64) (*vma.VmaEntry, error) {
	i := sort.Search(len(mappings), func(i int) bool { return mappings[i].GetEnd() > addr })
	if i == len(mappings) || mappings[i].GetStart() > addr {
		return nil, fmt.Errorf("the page at %#x is in no mapping", addr)
	}
	m := mappings[i]
	const must, mustNot = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, unix.MAP_LOCKED | unix.MAP_HUGETLB
	if flags := m.GetFlags(); flags&must != must || flags&mustNot != 0 {
		return nil, fmt.Errorf("the page at %#x is lazy, and its mapping (flags %#x) cannot be", addr, flags)
	}
	return m, nil
}
