package pager

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

func TestPages(t *testing.T) {
	const n = 3 * chunkPages
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	p, model := newPages(n), make([]state, n)
	copied, old := p, model
	for i := range 20000 {
		if i == 10000 {
			copied, old = p.clone(), append([]state(nil), model...)
		}
		at, s := random.Uint64N(n), state(random.IntN(int(held)+1))
		p.set(at, s)
		model[at] = s
	}
	for i := range uint64(n) {
		if p.get(i) != model[i] || copied.get(i) != old[i] {
			t.Fatalf("page %d: %d, clone %d; want %d, %d", i, p.get(i), copied.get(i), model[i], old[i])
		}
	}
	if newPages(n).chunks[0] != nil {
		t.Error("pages without a state take memory")
	}
}

// table shows regions with one character for each page of 4 KiB up to 16: where
// it comes from in the source, + for zeros that nobody has, - where no region is.
func table(rs regions) string {
	var s strings.Builder
	for page := range uint64(16) {
		r := rs.find(uffd.Addr(page << 12))
		switch {
		case r == nil:
			s.WriteByte('-')
		case r.source == nil:
			s.WriteByte('+')
		case r.state(r.index(uffd.Addr(page<<12))) == removed:
			s.WriteByte('0')
		default:
			fmt.Fprintf(&s, "%x", r.sourceOffset(r.index(uffd.Addr(page<<12)))>>12)
		}
	}
	return s.String()
}

func TestRegions(t *testing.T) {
	span := func(first, n uint64) uffd.Range { return uffd.Range{Start: uffd.Addr(first << 12), Len: n << 12} }
	remap := func(from, to, n uint64) func(*regions) {
		return func(rs *regions) {
			rs.remap(uffd.Remap{From: uffd.Addr(from << 12), To: uffd.Addr(to << 12), Len: n << 12})
		}
	}
	unmap := func(first, n uint64) func(*regions) { return func(rs *regions) { rs.unmap(span(first, n)) } }
	remove := func(first, n uint64) func(*regions) { return func(rs *regions) { rs.remove(span(first, n)) } }
	for _, test := range []struct {
		name   string
		events []func(*regions)
		want   string
	}{
		{"nothing", nil, "01234567--------"},
		{"unmap the middle", []func(*regions){unmap(2, 3)}, "01---567--------"},
		{"unmap beyond", []func(*regions){unmap(6, 10)}, "012345----------"},
		{"unmap all", []func(*regions){unmap(0, 16)}, "----------------"},
		{"unmap elsewhere", []func(*regions){unmap(9, 2)}, "01234567--------"},
		{"remove", []func(*regions){remove(1, 2), remove(7, 9)}, "00034560--------"},
		{"remap all", []func(*regions){remap(0, 8, 8), unmap(0, 8)}, "--------01234567"},
		{"remap a part", []func(*regions){remap(2, 10, 2), unmap(2, 2)}, "01--4567--23----"},
		{"remap without unmapping", []func(*regions){remap(2, 10, 2)}, "01++4567--23----"},
		{"remap removed pages", []func(*regions){remove(3, 1), remap(2, 10, 2), unmap(2, 2)}, "01--4567--20----"},
		{"remap onto others", []func(*regions){remap(0, 6, 2), unmap(0, 2)}, "--234501--------"},
		{"remap and back", []func(*regions){remap(2, 10, 2), unmap(2, 2), remap(10, 2, 2), unmap(10, 2)}, "01234567--------"},
		{"remap what nobody has", []func(*regions){remap(9, 12, 2)}, "01234567--------"},
		{"remove after a remap", []func(*regions){remap(2, 10, 2), unmap(2, 2), remove(10, 1), remove(0, 1)}, "01--4567--03----"},
	} {
		var rs regions
		r := &region{Range: span(0, 8), pageSize: 4096, source: source.Zero(1 << 20), states: newPages(8)}
		rs.insert(r)
		for _, event := range test.events {
			event(&rs)
		}
		want := test.want
		if got := table(rs); got != want {
			t.Errorf("%s: %s, want %s", test.name, got, want)
		}
		for i := 1; i < len(rs); i++ {
			if rs[i-1].End() > rs[i].Start {
				t.Errorf("%s: %v and %v overlap", test.name, rs[i-1].Range, rs[i].Range)
			}
		}
	}
}

// Faults in sequence bring in more and more pages, those that jump about one.
func TestWindow(t *testing.T) {
	const limit = 16
	r := &region{Range: uffd.Range{Start: 0, Len: 1 << 24}, pageSize: 4096, source: source.Zero(1 << 24), states: newPages(1 << 12)}
	r.around.window = limit
	fault := func(i uint64) (first, n uint64) {
		first, n = r.window(i, limit)
		if i < first || i >= first+n || n > limit {
			t.Fatalf("a fault of page %d brings in %d from %d on", i, n, first)
		}
		for p := first; p < first+n; p++ {
			if r.state(p) != absent {
				t.Fatalf("page %d is there already", p)
			}
			r.setState(p, present)
		}
		return first, n
	}
	for _, i := range []uint64{1000, 2000, 3000, 500, 1500, 2500} {
		fault(i)
	}
	if _, n := fault(3500); n != 1 {
		t.Errorf("a random fault brings in %d pages, want 1", n)
	}
	next, faults := uint64(0), 0
	for next < 256 {
		first, n := fault(next)
		next = first + n
		faults++
	}
	if faults > 256/limit+6 {
		t.Errorf("%d faults for 256 pages in sequence", faults)
	}
	// Not across what the source has of another kind.
	r = &region{Range: uffd.Range{Start: 0, Len: 1 << 16}, pageSize: 4096, states: newPages(16),
		source: source.Layer(source.FromBytes(make([]byte, 5<<12)), source.Zero(2<<12))}
	r.around.window = 32
	for _, want := range []struct{ page, first, n uint64 }{{0, 0, 2}, {1, 0, 2}, {3, 3, 2}, {4, 4, 1}} {
		r.around.window = 32
		if first, n := r.window(want.page, 16); first != want.first || n != want.n {
			t.Errorf("page %d brings in %d from %d on, want %d from %d on", want.page, n, first, want.n, want.first)
		}
	}
}

func TestBackoff(t *testing.T) {
	for n := range 1000 {
		if d := backoff(againMin, n); d < againMin || d > 1024*againMin || n > 0 && d < backoff(againMin, n-1) {
			t.Fatalf("backoff after %d tries is %v", n, d)
		}
	}
}

func TestHistogram(t *testing.T) {
	var h histogram
	for _, d := range []time.Duration{-1, 0, 1, 1000, 1500, time.Hour} {
		h.observe(d)
	}
	s := h.load()
	if s.Count() != 6 {
		t.Errorf("counted %d, want 6", s.Count())
	}
	for _, test := range []struct {
		q    float64
		want time.Duration
	}{{0, 1}, {0.5, 2}, {0.75, 2048}, {1, 1 << 39}} {
		if got := s.Quantile(test.q); got != test.want {
			t.Errorf("quantile %v is %v, want %v", test.q, got, test.want)
		}
	}
	if d := (&Histogram{}).Quantile(0.5); d != 0 {
		t.Errorf("quantile of nothing is %v", d)
	}
}

// Pages are found by their place in what was attached, wherever they are now.
func TestLocate(t *testing.T) {
	var rs regions
	for home, start := range []uffd.Addr{0, 0x100000} {
		r := &region{Range: uffd.Range{Start: start, Len: 8 << 12}, pageSize: 4096, source: source.Zero(1 << 20), states: newPages(8), home: home}
		rs.insert(r)
	}
	rs.unmap(uffd.Range{Start: 1 << 12, Len: 1 << 12})
	rs.remap(uffd.Remap{From: 4 << 12, To: 0x200000, Len: 2 << 12}) // and something stays behind
	got := rs.locate(nil, run{0, 0, 6})
	want := []uffd.Range{{Start: 0, Len: 1 << 12}, {Start: 2 << 12, Len: 2 << 12}, {Start: 0x200000, Len: 2 << 12}}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	got = rs.locate(nil, run{1, 7, 1})
	if want := []uffd.Range{{Start: 0x107000, Len: 1 << 12}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// Fault-around finds out whether what it brings in is touched, and brings in less
// if not.
func TestWaste(t *testing.T) {
	const pages, limit = 1 << 14, 16
	// access faults the pages that are touched one after the other, and returns
	// how many came in by faults, how many with them, and of those in vain, as
	// they really are and as they are estimated.
	access := func(touch func(k uint64) uint64) (faults, along, wasted, estimate uint64) {
		r := &region{Range: uffd.Range{Start: 0, Len: pages << 12}, pageSize: 4096, source: source.Zero(1 << 40), states: newPages(pages)}
		r.around.window = limit
		touched := make([]bool, pages)
		for k := range uint64(pages) {
			i := touch(k)
			if i >= pages || touched[i] {
				continue
			}
			touched[i] = true
			if r.state(i) != absent {
				continue
			}
			r.touched(i, limit)
			first, n := r.window(i, limit)
			first, n, w := r.sample(i, first, n)
			if i < first || i >= first+n {
				t.Fatalf("a fault of page %d brings in %d from %d on", i, n, first)
			}
			r.filled(first, n)
			faults, along, estimate = faults+1, along+n-1, estimate+w
		}
		for i := range uint64(pages) {
			if r.state(i) == present && !touched[i] {
				wasted++
			}
		}
		return faults, along, wasted, estimate
	}
	for _, test := range []struct {
		name      string
		touch     func(k uint64) uint64
		maxFaults uint64
		maxAlong  uint64
	}{
		// Two in a hundred more faults than without samples.
		{"sequence", func(k uint64) uint64 { return k }, pages / limit * 102 / 100, pages},
		{"backwards", func(k uint64) uint64 { return pages - 1 - k }, pages / limit * 102 / 100, pages},
		{"every other", func(k uint64) uint64 { return k * 2 }, pages / 2, 2500},
		{"three at a time, far apart", func(k uint64) uint64 { return k/3*32 + k%3 }, pages / 32 * 3, pages / 2 * 3 / 10},
		{"jumping, then in sequence", func(k uint64) uint64 {
			if k < 200 {
				return k * 37
			}
			return pages/2 + k - 200
		}, 200 + pages/2/limit*105/100, pages / 2},
	} {
		faults, along, wasted, estimate := access(test.touch)
		t.Logf("%s: %d faults, %d came along, %d in vain, %d by estimate", test.name, faults, along, wasted, estimate)
		if faults > test.maxFaults+10 {
			t.Errorf("%s: %d faults, want %d at most", test.name, faults, test.maxFaults)
		}
		if along > test.maxAlong {
			t.Errorf("%s: %d pages came along, want %d at most", test.name, along, test.maxAlong)
		}
		if estimate > 2*wasted+50 || estimate+20 < wasted/8 {
			t.Errorf("%s: %d pages wasted by estimate, in fact %d", test.name, estimate, wasted)
		}
	}
}
