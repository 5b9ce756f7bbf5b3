package pager

import (
	"math/rand/v2"

	"github.com/go-uffd/uffd/source"
)

// around is how many pages the faults of a region bring in. A fault that borders
// on what an earlier one brought doubles the number, any other halves it.
//
// Nobody says whether pages that came along are ever touched. So now and then one
// of them is left out, as a sample: if a fault asks for it, the others were worth
// it, too. If not, they are taken for wasted, and less is brought in.
type around struct {
	window uint64
	recent [4]struct{ first, end uint64 } // in the order of time, from next on
	next   int

	most    uint64 // pages of a window, as samples tell; 0: as many as may be
	pause   int    // windows until the next sample; random, to fit no pattern
	along   uint64 // pages that came along since the last one
	samples [4]sample
	taken   int
}

// A sample is a page that was left out.
type sample struct {
	waits  bool   // for a fault
	page   uint64 // of the states
	stands uint64 // for how many that came along
}

// Windows from one sample to the next, on average. As long as samples are not
// touched there are more of them; when two pages are too many, each window leaves
// one out.
const (
	sampleSoon = 8
	sampleLate = 64
)

// touched takes note of the fault of a page, which may be a sample.
func (r *region) touched(i, limit uint64) {
	a := &r.around
	for k := range a.samples {
		if s := &a.samples[k]; s.waits && s.page == r.first+i {
			s.waits = false
			a.pause = rand.N(2 * sampleLate)
			a.most = min(a.most*2, limit)
		}
	}
}

// sample leaves a page out of a window that the fault of page i brings in, if it
// is time to. It returns the rest, and how many earlier pages were wasted.
func (r *region) sample(i, first, n uint64) (restFirst, rest, wasted uint64) {
	a := &r.around
	if n == 1 {
		return first, n, 0
	}
	if a.pause > 0 {
		a.pause--
		a.along += n - 1
		return first, n, 0
	}
	a.pause = rand.N(2 * sampleSoon)
	s := &a.samples[a.taken%len(a.samples)]
	if s.waits && r.states.get(s.page) == absent {
		wasted = s.stands
		switch a.most {
		case 0:
			a.most = max(a.window/2, 2)
		case 2:
			a.pause = 0
		default:
			a.most /= 2
		}
	}
	left := first + n - 1
	if i == left || i != first && rand.N(2) == 0 {
		left = first
		first++
	}
	*s = sample{true, r.first + left, a.along + n - 2}
	a.along = 0
	a.taken++
	return first, n - 1, wasted
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
		if a.most > 0 {
			a.window = min(a.window, a.most)
		}
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
