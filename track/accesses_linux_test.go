package track

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// eachAccessMemory runs a test for each kind of memory, of n pages of another
// process.
func eachAccessMemory(t *testing.T, n int, test func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory)) {
	uffdtest.Require(t, accessFeatures)
	for _, kind := range uffdtest.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			n := n
			if kind.Huge() {
				n = 8
				uffdtest.LockSettings(t).HugePages(2 * n) // private ones may be copied
			}
			p := uffdtest.Start(t)
			mem := p.Map(kind, n)
			if kind == uffdtest.Anon {
				p.Madvise(mem.Range, unix.MADV_NOHUGEPAGE).Value()
			}
			test(t, p, mem)
		})
	}
}

func openAccessesIn(p *uffdtest.Process) *uffd.File {
	return p.Open(&uffd.Config{Require: accessFeatures})
}

func startAccessesOf(t testing.TB, p *uffdtest.Process, ranges ...uffd.Range) *Accesses {
	t.Helper()
	a, err := StartAccesses(openAccessesIn(p), p.Pid, ranges...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Stop() })
	return a
}

func TestAccesses(t *testing.T) {
	eachAccessMemory(t, 16, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		p.Fill(mem.Page(0), 1).Value()
		p.Fill(mem.Page(1), 1).Value() // others do not exist
		a := startAccessesOf(t, p, mem.Range)
		wantCollect(t, a, "started")
		p.Load(mem.Page(0).Start).Value()
		p.Load(mem.Page(2).Start).Value()
		wantCollect(t, a, "read", mem.Page(0), mem.Page(2))
		wantCollect(t, a, "nothing since")
		p.Store(mem.Page(1).Start, 2).Value() // existed
		p.Store(mem.Page(2).Start, 2).Value() // was read
		p.Store(mem.Page(4).Start, 2).Value() // does not exist
		wantCollect(t, a, "written", mem.Page(1), mem.Page(2), mem.Page(4))
		p.Load(mem.Page(4).Start).Value()
		p.Load(mem.Page(4).Start + 1).Value()
		wantCollect(t, a, "read again", mem.Page(4))
		p.Fill(mem.Range, 3).Value()
		wantCollect(t, a, "all", mem.Range)
		readAll(t, p, mem.Page(5))
		wantCollect(t, a, "read by another process", mem.Page(5))

		// A page that is discarded leaves no trace.
		p.Load(mem.Page(3).Start).Value()
		p.Madvise(mem.Page(3), unix.MADV_DONTNEED).Value()
		wantCollect(t, a, "discarded")
		p.Load(mem.Page(3).Start).Value()
		wantCollect(t, a, "read after that", mem.Page(3))

		// A loop that ends early loses nothing.
		var got []uffd.Range
		accessed := []uffd.Range{mem.Page(0), mem.Page(2), mem.Page(5), mem.Page(7)}
		for _, r := range accessed {
			p.Load(r.Start).Value()
		}
		for range 2 {
			for r, err := range a.Collect() {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, r)
				break
			}
		}
		if got = append(got, collect(t, a)...); !slices.Equal(join(got), accessed) {
			t.Errorf("in parts: collected %v, want %v", got, accessed)
		}
		wantCollect(t, a, "nothing since")

		if err := a.Stop(); err != nil {
			t.Errorf("Stop: %v", err)
		}
		if err := lastError(a); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Collect after Stop: %v", err)
		}
		if flags := p.VMFlags(mem.Start); slices.Contains(strings.Fields(flags), "ur") {
			t.Errorf("still registered after Stop: %s", flags)
		}
		p.Fill(mem.Range, 7).Value()
		if bad := p.Check(mem.Range, 7).Value(); bad != 0 {
			t.Errorf("%d bytes differ", bad)
		}
		if err := a.Stop(); err != nil {
			t.Errorf("second Stop: %v", err)
		}
	})
}

// TestAccessesTHP has an access count for a whole huge page.
func TestAccessesTHP(t *testing.T) {
	uffdtest.Require(t, accessFeatures)
	p := uffdtest.Start(t)
	mem := mapTHP(t, p)
	huge := mem.Len / 2
	first := uffd.Range{Start: mem.Start, Len: huge}
	second := first.Skip(int64(huge))
	second.Len = huge
	at := func(r uffd.Range, page int) uffd.Addr { return r.Start + uffd.Addr(page*os.Getpagesize()) }
	a := startAccessesOf(t, p, mem.Range)
	wantCollect(t, a, "started")
	p.Load(at(first, 5)).Value()
	wantCollect(t, a, "read", first)
	if n := p.Smaps(first.Start, "AnonHugePages"); n != huge {
		t.Errorf("%d bytes of huge pages after a collection, want %d", n, huge)
	}
	p.Store(at(second, 9), 1).Value() // does not exist
	wantCollect(t, a, "written", second)
	p.Load(at(first, 1)).Value()
	p.Store(at(second, 0), 1).Value()
	wantCollect(t, a, "both", mem.Range)
	wantCollect(t, a, "nothing since")
	// The rest of a huge page of which a part is discarded is small pages.
	p.Madvise(uffd.Range{Start: at(first, 3), Len: uint64(os.Getpagesize())}, unix.MADV_DONTNEED).Value()
	wantCollect(t, a, "discarded")
	p.Load(at(first, 7)).Value()
	wantCollect(t, a, "a small page", uffd.Range{Start: at(first, 7), Len: uint64(os.Getpagesize())})
}

// TestAccessesDifferential compares collections with what the process did.
func TestAccessesDifferential(t *testing.T) {
	uffdtest.Require(t, accessFeatures)
	rounds := 40
	if testing.Short() {
		rounds = 6
	}
	// granule is how many pages an access may count for.
	test := func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory, granule int) {
		a := startAccessesOf(t, p, mem.Range)
		seed, page, n := newSeed(t), uint64(mem.Kind.PageSize()), mem.Pages()
		total := 0
		for round := range rounds {
			seed++
			p.Run("act", uint64(mem.Start), page, uint64(n), seed, 1).Value()
			got := make([]bool, n)
			for _, r := range collect(t, a) {
				for at := r.Start; at < r.End(); at += uffd.Addr(page) {
					got[uint64(at-mem.Start)/page] = true
					total++
				}
			}
			list := actions(seed, n)
			accessed := func(action int) bool { return action == doRead || action == doWrite || action == doSyscall }
			for i, action := range list {
				first := i / granule * granule
				may := slices.ContainsFunc(list[first:min(first+granule, n)], accessed)
				if accessed(action) && !got[i] || got[i] && !may {
					t.Fatalf("round %d, seed %d: page %d, action %d: accessed = %v", round, seed, i, action, got[i])
				}
			}
		}
		t.Logf("%d rounds, %d pages collected", rounds, total)
	}
	eachAccessMemory(t, 300, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) { test(t, p, mem, 1) })
	t.Run("thp", func(t *testing.T) {
		p := uffdtest.Start(t)
		mem := mapTHP(t, p)
		test(t, p, mem, mem.Pages()/2)
	})
}

// accessors is how many threads access memory at a time.
const accessors = 6

// accessesOf are the pages that a thread accesses, in order. It writes where the
// number is odd.
func accessesOf(seed, thread, n, count uint64) []uint64 {
	random := rand.New(rand.NewPCG(seed, thread))
	list := make([]uint64, count)
	for i := range list {
		list[i] = random.Uint64N(2*n) ^ 1
	}
	return list
}

// The "access" threads count in a page at control, before and after each access.
var _ = uffdtest.Handle("access", func(args []uint64) ([]uint64, error) {
	start, page, n, seed, count, control := args[0], args[1], args[2], args[3], args[4], args[5]
	counters := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(uffdtest.BytesAt(control, 16*accessors)))), 2*accessors)
	pause := int(20_000 + 4_000_000/n) // for collections in which few pages were accessed
	var all sync.WaitGroup
	var sum atomic.Uint64
	for thread := range uint64(accessors) {
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, 100+thread))
			begun, done := &counters[2*thread], &counters[2*thread+1]
			for _, access := range accessesOf(seed, thread, n, count) {
				for spin := random.IntN(pause); spin > 0; spin-- {
					sum.Load()
				}
				b := uffdtest.BytesAt(start+access/2*page+8*thread, 1)
				atomic.AddUint64(begun, 1)
				if access%2 != 0 {
					b[0]++
				} else {
					sum.Add(uint64(b[0]))
				}
				atomic.AddUint64(done, 1)
			}
		})
	}
	all.Wait()
	return []uint64{sum.Load()}, nil
})

// TestAccessesConcurrent collects while several threads access memory, and
// compares each collection with what was accessed since the one before.
//
// An access that begins after a collection has begun, and is done before the next
// one begins, is in one of the two. A page that is collected was accessed after
// the collection before had begun.
func TestAccessesConcurrent(t *testing.T) {
	count := uint64(10_000)
	if testing.Short() {
		count = 1000
	}
	eachAccessMemory(t, 4000, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		count := count
		if mem.Kind.Huge() {
			count /= 10
		}
		control := p.Map(uffdtest.Anon, 1)
		p.Fill(control.Range, 0).Value()
		page, n, seed := uint64(mem.Kind.PageSize()), uint64(mem.Pages()), newSeed(t)
		var accesses [accessors][]uint64
		for thread := range accesses {
			accesses[thread] = accessesOf(seed, uint64(thread), n, count)
		}
		// counters are how many accesses each thread has begun, and done.
		counters := func() (begun, done [accessors]uint64) {
			var b [16 * accessors]byte
			if err := readMemory(p.Pid, b[:], control.Start); err != nil {
				t.Fatal(err)
			}
			for i := range accessors {
				begun[i], done[i] = binary.NativeEndian.Uint64(b[16*i:]), binary.NativeEndian.Uint64(b[16*i+8:])
			}
			return begun, done
		}

		a := startAccessesOf(t, p, mem.Range)
		call := p.Run("access", uint64(mem.Start), page, n, seed, count, uint64(control.Start))
		var lastBegun, lastDone [accessors]uint64 // when the last collection began
		last := make([]bool, n)
		collections, pages, checked, alone := 0, 0, 0, 0
		for over := false; !over; {
			over = call.Done()
			begun, done := counters()
			now := make([]bool, n)
			for _, r := range collect(t, a) {
				for at := r.Start; at < r.End(); at += uffd.Addr(page) {
					now[uint64(at-mem.Start)/page] = true
					pages++
				}
			}
			after, _ := counters()
			times := make([]int, n) // how often a page may have been accessed
			for thread, list := range accesses {
				for _, access := range list[lastDone[thread]:after[thread]] {
					times[access/2]++
				}
			}
			for thread, list := range accesses {
				for i := lastBegun[thread]; i < done[thread]; i++ {
					k := list[i] / 2
					checked++
					if times[k] == 1 {
						alone++ // nothing else would show that it is lost
					}
					if !last[k] && !now[k] {
						t.Fatalf("collection %d: page %d, access %d of thread %d is lost", collections, k, i, thread)
					}
				}
			}
			for k := range now {
				if now[k] && times[k] == 0 {
					t.Fatalf("collection %d: page %d is collected, and was not accessed", collections, k)
				}
			}
			lastBegun, lastDone, last = begun, done, now
			collections++
		}
		call.Value()
		t.Logf("%d pages in %d collections; %d accesses checked, %d of them alone", pages, collections, checked, alone)
		if checked == 0 || pages == 0 {
			t.Error("nothing was checked")
		}
		collect(t, a)
		wantCollect(t, a, "at rest")
	})
}

// TestAccessesMappings tracks memory of several mappings, with a hole, and with
// huge pages that begin anywhere in the range; and changes it.
func TestAccessesMappings(t *testing.T) {
	uffdtest.Require(t, accessFeatures)
	p := uffdtest.Start(t)
	page := uint64(os.Getpagesize())
	const private = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	huge := uint64(uffdtest.HugePageSize())
	uffdtest.LockSettings(t).HugePages(6)
	// hole, small pages, huge pages, small pages
	base := p.Mmap(0, 8*huge, unix.PROT_NONE, private|unix.MAP_NORESERVE, -1)
	hugetlb := uffd.Range{Start: (base + uffd.Addr(3*huge-1)) &^ uffd.Addr(huge-1), Len: 3 * huge}
	p.Mmap(hugetlb.Start, hugetlb.Len, readWrite, private|unix.MAP_FIXED|unix.MAP_HUGETLB, -1)
	before := uffd.Range{Start: hugetlb.Start - uffd.Addr(12*page), Len: 12 * page}
	after := uffd.Range{Start: hugetlb.End(), Len: 3 * page}
	at := func(r uffd.Range, i int) uffd.Range {
		return uffd.Range{Start: r.Start + uffd.Addr(uint64(i)*page), Len: page}
	}
	for _, r := range []uffd.Range{before, after} {
		p.Mmap(r.Start, r.Len, readWrite, private|unix.MAP_FIXED, -1)
		p.Madvise(r, unix.MADV_NOHUGEPAGE).Value()
	}
	p.Munmap(at(before, 5)).Value()
	p.Mprotect(at(before, 7), unix.PROT_READ).Value()
	all := uffd.Range{Start: before.Start, Len: uint64(after.End() - before.Start)}
	p.Store(at(after, 1).Start, 1).Value()
	p.Store(hugetlb.Start, 1).Value()

	a := startAccessesOf(t, p, all)
	wantCollect(t, a, "started")
	p.Load(at(before, 7).Start).Value()
	p.Store(at(before, 11).Start, 1).Value() // what follows comes in one region with it
	p.Store(hugetlb.Start+uffd.Addr(huge)-1, 1).Value()
	p.Store(hugetlb.End()-1, 1).Value()
	p.Store(at(after, 0).Start, 1).Value()
	firstHuge := uffd.Range{Start: hugetlb.Start, Len: huge}
	lastHuge := uffd.Range{Start: hugetlb.End() - uffd.Addr(huge), Len: huge}
	wantCollect(t, a, "accessed", at(before, 7), at(before, 11), firstHuge, lastHuge, at(after, 0))
	wantCollect(t, a, "nothing since")
	p.Load(hugetlb.Start).Value()
	wantCollect(t, a, "a huge page", firstHuge)

	p.Store(at(before, 0).Start, 1).Value()
	p.Store(at(before, 1).Start, 1).Value()
	p.Store(at(before, 2).Start, 1).Value()
	p.Munmap(at(before, 2)).Value()
	p.Mprotect(at(before, 1), unix.PROT_NONE).Value()
	wantCollect(t, a, "changed", at(before, 0), at(before, 1))
	p.Mprotect(at(before, 1), readWrite).Value()
	wantCollect(t, a, "accessible again")
	p.Load(at(before, 1).Start).Value()
	wantCollect(t, a, "and accessed", at(before, 1))

	// What is mapped later is not tracked, nor what was moved.
	p.Mmap(at(before, 2).Start, page, readWrite, private|unix.MAP_FIXED, -1)
	p.Store(at(before, 2).Start, 1).Value()
	p.Mremap(at(after, 0), page, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, at(before, 5).Start).Value()
	p.Load(at(before, 5).Start).Value()
	p.Load(at(before, 0).Start).Value()
	wantCollect(t, a, "mapped and moved", at(before, 0))
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, r := range []uffd.Range{at(before, 1), firstHuge, at(after, 1)} {
		if flags := p.VMFlags(r.Start); slices.Contains(strings.Fields(flags), "ur") {
			t.Errorf("%v is still registered after Stop: %s", r, flags)
		}
		p.Fill(r, 2).Value()
	}
}

func TestAccessesGone(t *testing.T) {
	uffdtest.Require(t, accessFeatures)
	for _, access := range []bool{false, true} {
		t.Run(fmt.Sprintf("accessed=%v", access), func(t *testing.T) {
			p := uffdtest.Start(t)
			mem := p.Map(uffdtest.Anon, 4)
			a := startAccessesOf(t, p, mem.Range)
			if access {
				p.Fill(mem.Range, 1).Value()
			}
			p.Kill()
			if err := lastError(a); !errors.Is(err, uffd.ErrGone) {
				t.Errorf("Collect: %v, want ErrGone", err)
			}
			if err := a.Stop(); err != nil {
				t.Errorf("Stop: %v", err)
			}
		})
	}
}

func TestStopOvertakesAccesses(t *testing.T) {
	uffdtest.Require(t, accessFeatures)
	p := uffdtest.Start(t)
	first, second := p.Map(uffdtest.Anon, 2), p.Map(uffdtest.Anon, 3)
	if second.Start < first.Start {
		first, second = second, first
	}
	a := startAccessesOf(t, p, first.Range, second.Range)
	overtake(t, p, a, a.file, []uffd.Range{first.Range, second.Range})
}

// TestAccessesOwn tracks the test process itself, which collects garbage
// meanwhile: nothing hangs.
func TestAccessesOwn(t *testing.T) {
	uffdtest.Require(t, accessFeatures)
	m := anonymous(t, 64)
	if err := unix.Madvise(m.bytes, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	f, err := OpenAccesses()
	if err != nil {
		t.Fatal(err)
	}
	a, err := StartAccesses(f, 0, m.span(0, 60))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Stop()
	m.write(3, 9)
	m.write(58, 64)
	for _, err := range a.Collect() {
		if err != nil {
			t.Fatal(err)
		}
		for _, err := range a.Collect() {
			if !errors.Is(err, unix.EINVAL) {
				t.Errorf("Collect in a Collect: %v", err)
			}
		}
		break
	}
	wantCollect(t, a, "the rest", m.span(58, 60))

	var all sync.WaitGroup
	var over atomic.Bool
	for i := range min(2*runtime.GOMAXPROCS(0), 20) {
		all.Go(func() {
			own := m.bytes[(20+i)*m.page:][:m.page]
			for !over.Load() {
				m.write(i, i+1)
				copy(own, m.bytes[i*m.page:])
				runtime.Gosched()
			}
		})
	}
	for range 50 {
		collect(t, a)
		runtime.GC()
	}
	over.Store(true)
	all.Wait()
	collect(t, a)
	m.write(0, 1)
	wantCollect(t, a, "written", m.span(0, 1))
}

// TestAccessesMany collects more than fits into one scan.
func TestAccessesMany(t *testing.T) {
	uffdtest.Require(t, accessFeatures)
	m := anonymous(t, 20000)
	if err := unix.Madvise(m.bytes, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	f, err := OpenAccesses()
	if err != nil {
		t.Fatal(err)
	}
	a, err := StartAccesses(f, 0, m.r())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Stop()
	var want []uffd.Range
	for i := 0; i < m.pages(); i += 2 {
		m.write(i, i+1)
		want = append(want, m.span(i, i+1))
	}
	if got := collect(t, a); !slices.Equal(got, want) {
		t.Errorf("%d ranges are accessed, want %d", len(got), len(want))
	}
	if len(want) < 2*len(a.collector.buf) {
		t.Fatalf("%d ranges do not need several scans", len(want))
	}
	wantCollect(t, a, "nothing since")
}

func TestStartAccessesErrors(t *testing.T) {
	uffdtest.Require(t, accessFeatures)
	p := uffdtest.Start(t)
	mem, none := p.Map(uffdtest.Anon, 8), p.Map(uffdtest.Anon, 2)
	p.Mprotect(none.Range, unix.PROT_NONE).Value()
	m := anonymous(t, 8)
	hole := uffd.Range{Start: uffd.Addr(os.Getpagesize()), Len: uint64(os.Getpagesize())}
	in := func(features uffd.Features) func() *uffd.File {
		return func() *uffd.File { return p.Open(&uffd.Config{Require: features}) }
	}
	own := func() *uffd.File {
		f, err := OpenAccesses()
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	good := in(accessFeatures)
	for _, c := range []struct {
		name   string
		open   func() *uffd.File
		pid    int
		ranges []uffd.Range
		err    error
		says   string
	}{
		{"no features", in(0), p.Pid, []uffd.Range{mem.Range}, unix.EINVAL, "lacks RWP|RWP_ASYNC (Linux 7.3)"},
		{"sync", in(uffd.FeatureRWP), p.Pid, []uffd.Range{mem.Range}, unix.EINVAL, "lacks RWP_ASYNC"},
		{"events", in(accessFeatures | uffd.FeatureEventUnmap), p.Pid, []uffd.Range{mem.Range}, unix.EINVAL, "EVENT_UNMAP"},
		{"overlap", good, p.Pid, []uffd.Range{mem.Page(1), mem.Range}, unix.EINVAL, "overlap"},
		{"part of a page", good, p.Pid, []uffd.Range{{Start: mem.Start, Len: 5}}, unix.EINVAL, "whole pages"},
		{"nothing mapped", good, p.Pid, []uffd.Range{mem.Range, hole}, unix.EINVAL, ""},
		{"not accessible", good, p.Pid, []uffd.Range{mem.Range, none.Range}, unix.EINVAL, ""},
		{"no process", good, 1 << 30, []uffd.Range{mem.Range}, os.ErrNotExist, ""},
		{"another process", own, p.Pid, []uffd.Range{m.r()}, unix.EINVAL, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := c.open()
			defer f.Close()
			a, err := StartAccesses(f, c.pid, c.ranges...)
			if a != nil || !errors.Is(err, c.err) || !strings.Contains(fmt.Sprint(err), c.says) {
				t.Fatalf("StartAccesses = %v, %v; want %v that says %q", a != nil, err, c.err, c.says)
			}
			// The File is the caller's, and nothing is registered with it.
			if flags := p.VMFlags(mem.Start); slices.Contains(strings.Fields(flags), "ur") {
				t.Errorf("still registered: %s", flags)
			}
			if f.Features() != accessFeatures || c.name == "another process" {
				return
			}
			if a, err = StartAccesses(f, p.Pid, mem.Page(2)); err != nil {
				t.Fatalf("StartAccesses after a failure: %v", err)
			}
			p.Store(mem.Page(2).Start, 1).Value()
			wantCollect(t, a, "after a failure", mem.Page(2))
			a.Stop()
		})
	}
	t.Run("same addresses in another process", func(t *testing.T) {
		q := uffdtest.Start(t)
		r := uffd.Range{Start: 0x10000000, Len: 4 * uint64(os.Getpagesize())}
		for _, x := range []*uffdtest.Process{p, q} {
			x.Mmap(r.Start, r.Len, readWrite, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED, -1)
		}
		if _, err := StartAccesses(openAccessesIn(q), p.Pid, r); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "belongs to another") {
			t.Errorf("StartAccesses: %v, want EINVAL", err)
		}
		q.Fill(r, 1).Value() // and q goes on
	})
}

func TestOpenAccesses(t *testing.T) {
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	f, err := OpenAccesses()
	if offered.Has(accessFeatures) {
		if err != nil || f.Features() != accessFeatures {
			t.Fatalf("OpenAccesses = %v, %v", f, err)
		}
		f.Close()
		return
	}
	if !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), "Linux 7.3") {
		t.Errorf("OpenAccesses on a kernel that offers %v: %v", offered, err)
	}
}
