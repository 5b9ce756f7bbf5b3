package track

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// eachMemory runs a test for each method and kind of memory, of n pages of
// another process. Memory of transparent huge pages is n of these, in small
// pages.
func eachMemory(t *testing.T, n int, test func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory)) {
	for _, method := range []Method{Async, Sync} {
		run := func(name string, kind uffdtest.Kind, get func(t *testing.T, p *uffdtest.Process) uffdtest.Memory) {
			t.Run(method.String()+"/"+name, func(t *testing.T) {
				require(t, method, kind)
				p := uffdtest.Start(t)
				mem := get(t, p)
				test(t, p, openIn(p, method), mem)
			})
		}
		for _, kind := range uffdtest.Kinds {
			run(kind.String(), kind, func(t *testing.T, p *uffdtest.Process) uffdtest.Memory {
				if kind.Huge() {
					pages := 8
					uffdtest.LockSettings(t).HugePages(2 * pages) // private ones may be copied
					return p.Map(kind, pages)
				}
				return p.Map(kind, n)
			})
		}
		run("thp", uffdtest.Anon, func(t *testing.T, p *uffdtest.Process) uffdtest.Memory {
			return mapTHP(t, p)
		})
	}
}

func require(t *testing.T, method Method, kind uffdtest.Kind) {
	t.Helper()
	switch {
	case method == Async:
		uffdtest.Require(t, uffd.FeatureWPAsync)
	case kind == uffdtest.Anon:
		uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
	default:
		uffdtest.Require(t, uffd.FeaturePagefaultFlagWP|uffd.FeatureWPHugetlbfsShmem)
	}
}

// openIn has p open what [Open] or openSync would.
func openIn(p *uffdtest.Process, method Method) *uffd.File {
	if method == Async {
		return p.Open(&uffd.Config{Require: uffd.FeatureWPAsync})
	}
	return p.Open(&uffd.Config{Require: uffd.FeaturePagefaultFlagWP, Prefer: uffd.FeatureEventRemove})
}

func startWrites(t testing.TB, f *uffd.File, pid int, ranges ...uffd.Range) *Writes {
	t.Helper()
	w, err := Start(f, pid, ranges...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Stop() })
	return w
}

// A tracker is a *Writes or an *Accesses.
type tracker interface {
	Collect() iter.Seq2[uffd.Range, error]
	Stop() error
}

// collect returns a whole collection.
func collect(t testing.TB, w tracker) (ranges []uffd.Range) {
	t.Helper()
	for r, err := range w.Collect() {
		if err != nil {
			t.Fatal(err)
		}
		ranges = append(ranges, r)
	}
	return join(ranges)
}

func wantCollect(t testing.TB, w tracker, when string, want ...uffd.Range) {
	t.Helper()
	if got := collect(t, w); !slices.Equal(got, join(want)) {
		t.Errorf("%s: collected %v, want %v", when, got, join(want))
	}
}

// lastError returns the error at the end of a collection.
func lastError(w tracker) (last error) {
	for _, err := range w.Collect() {
		last = err
	}
	return last
}

func TestWrites(t *testing.T) {
	eachMemory(t, 16, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		p.Fill(mem.Page(0), 1).Value() // others do not exist
		w := startWrites(t, f, p.Pid, mem.Range)
		if want := map[bool]Method{true: Async, false: Sync}[f.Features().Has(uffd.FeatureWPAsync)]; w.Method() != want {
			t.Errorf("Method = %v, want %v", w.Method(), want)
		}
		wantCollect(t, w, "started")
		p.Load(mem.Page(0).Start).Value()
		p.Load(mem.Page(1).Start).Value()
		wantCollect(t, w, "read")
		p.Store(mem.Page(0).Start, 2).Value() // existed
		p.Store(mem.Page(1).Start, 2).Value() // was read
		p.Store(mem.Page(3).Start, 2).Value() // does not exist
		wantCollect(t, w, "written", mem.Page(0), mem.Page(1), mem.Page(3))
		wantCollect(t, w, "nothing since")
		p.Store(mem.Page(3).Start, 3).Value()
		p.Store(mem.Page(3).Start+1, 3).Value()
		wantCollect(t, w, "written again", mem.Page(3))
		p.Fill(mem.Range, 4).Value()
		wantCollect(t, w, "all", mem.Range)

		// A loop that ends early loses nothing.
		var got []uffd.Range
		written := []uffd.Range{mem.Page(0), mem.Page(2), mem.Page(5), mem.Page(7)}
		for _, r := range written {
			p.Store(r.Start, 5).Value()
		}
		for range 2 {
			for r, err := range w.Collect() {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, r)
				break
			}
		}
		if got = append(got, collect(t, w)...); !slices.Equal(join(got), written) {
			t.Errorf("in parts: %v are written, want %v", got, written)
		}
		wantCollect(t, w, "nothing since")

		p.Store(mem.Page(1).Start, 6).Value()
		if err := w.Stop(); err != nil {
			t.Errorf("Stop: %v", err)
		}
		if err := lastError(w); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Collect after Stop: %v", err)
		}
		if flags := p.VMFlags(mem.Start); strings.Contains(flags, "uw") || strings.Contains(flags, "um") {
			t.Errorf("still registered after Stop: %s", flags)
		}
		p.Fill(mem.Range, 7).Value()
		if bad := p.Check(mem.Range, 7).Value(); bad != 0 {
			t.Errorf("%d bytes differ", bad)
		}
		if err := w.Stop(); err != nil {
			t.Errorf("second Stop: %v", err)
		}
	})
}

// Who discards pages goes on as soon as that is read. A collection waits until it
// is booked.
func TestCollectDiscarded(t *testing.T) {
	require(t, Sync, uffdtest.Anon)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 4)
	p.Fill(mem.Range, 1).Value()
	w := startWrites(t, openIn(p, Sync), p.Pid, mem.Range)
	w.faults.mu.Lock() // nothing is booked
	p.Madvise(mem.Page(1), unix.MADV_DONTNEED).Value()
	settled := make(chan struct{})
	go func() {
		w.faults.settle()
		close(settled)
	}()
	select {
	case <-settled:
		t.Error("what was read is not booked, and is not waited for")
	case <-time.After(20 * time.Millisecond):
	}
	w.faults.mu.Unlock()
	<-settled
	wantCollect(t, w, "discarded", mem.Page(1))
}

// What a process does with a page, at random.
const (
	doNothing = iota
	doRead
	doWrite
	doSyscall // has the kernel write
	doDiscard
	doCount
)

// actions are what a process does in a round: one for each page.
func actions(seed uint64, n int) []int {
	random := rand.New(rand.NewPCG(seed, 1))
	density := random.Float64()
	list := make([]int, n)
	for i := range list {
		if random.Float64() < density {
			list[i] = random.IntN(doCount)
		}
	}
	return list
}

var _ = uffdtest.Handle("act", func(args []uint64) ([]uint64, error) {
	start, page, n, seed, syscalls := args[0], args[1], args[2], args[3], args[4] != 0
	zero, err := unix.Open("/dev/zero", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(zero)
	var sum uint64
	for i, action := range actions(seed, int(n)) {
		a := start + uint64(i)*page
		if action == doSyscall && !syscalls {
			action = doWrite
		}
		switch action {
		case doRead:
			sum += uint64(uffdtest.BytesAt(a, 1)[0])
		case doWrite:
			uffdtest.BytesAt(a+page-1, 1)[0]++
		case doSyscall:
			if _, err := unix.Read(zero, uffdtest.BytesAt(a, 1)); err != nil {
				return nil, err
			}
		case doDiscard:
			if err := unix.Madvise(uffdtest.BytesAt(a, page), unix.MADV_DONTNEED); err != nil {
				return nil, err
			}
		}
	}
	return []uint64{sum}, nil
})

func newSeed(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return seed
}

// TestWritesDifferential compares collections with what the process did.
func TestWritesDifferential(t *testing.T) {
	rounds := 30
	if testing.Short() {
		rounds = 6
	}
	eachMemory(t, 300, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		var syscalls uint64 = 1
		if unix.Geteuid() != 0 && !f.Features().Has(uffd.FeatureWPAsync) {
			syscalls = 0 // their faults may not be trapped
		}
		w := startWrites(t, f, p.Pid, mem.Range)
		seed, page, n := newSeed(t), uint64(mem.Kind.PageSize()), mem.Pages()
		before := make([]bool, n) // written in the round before
		for round := range rounds {
			seed++
			p.Run("act", uint64(mem.Start), page, uint64(n), seed, syscalls).Value()
			got := make([]bool, n)
			for _, r := range collect(t, w) {
				for a := r.Start; a < r.End(); a += uffd.Addr(page) {
					got[uint64(a-mem.Start)/page] = true
				}
			}
			for i, action := range actions(seed, n) {
				written := action == doWrite || action == doSyscall || action == doDiscard && mem.Kind == uffdtest.Anon
				// A signal makes a thread report its fault twice, and the second message
				// can be answered after the collection.
				late := got[i] && before[i] && !f.Features().Has(uffd.FeatureWPAsync)
				before[i] = written
				// To discard pages of a file is a change only if they are private.
				if got[i] != written && !late && action != doDiscard || written && !got[i] {
					t.Fatalf("round %d, seed %d: page %d, action %d: written = %v", round, seed, i, action, got[i])
				}
			}
		}
	})
}

// writers is how many threads write at a time, each to a word of its own in
// each page.
const writers = 6

var _ = uffdtest.Handle("write", func(args []uint64) ([]uint64, error) {
	start, page, n, seed, writes := args[0], args[1], args[2], args[3], args[4]
	var all sync.WaitGroup
	for w := range uint64(writers) {
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, w))
			for i := range writes {
				word := uffdtest.BytesAt(start+random.Uint64N(n)*page+8*w, 8)
				binary.NativeEndian.PutUint64(word, i+1)
			}
		})
	}
	all.Wait()
	return nil, nil
})

// TestWritesTransactions keeps a copy of what several threads write, by reading
// the pages of each collection. One lost write, and it differs.
func TestWritesTransactions(t *testing.T) {
	writes := uint64(30000)
	if testing.Short() {
		writes = 1500
	}
	eachMemory(t, 200, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		w := startWrites(t, f, p.Pid, mem.Range)
		writes := writes
		if w.Method() == Async {
			writes *= 5 // they do not wait
		}
		page, n := uint64(mem.Kind.PageSize()), mem.Pages()
		read := func(a uffd.Addr) (words [8 * writers]byte) {
			local := []unix.Iovec{{Base: &words[0]}}
			local[0].SetLen(len(words))
			remote := []unix.RemoteIovec{{Base: uintptr(a), Len: len(words)}}
			if n, err := unix.ProcessVMReadv(p.Pid, local, remote, 0); n != len(words) {
				t.Fatalf("reading page %v: %v", a, err)
			}
			return words
		}
		copies := make([][8 * writers]byte, n)
		update := func() (pages int) {
			for _, r := range collect(t, w) {
				for a := r.Start; a < r.End(); a += uffd.Addr(page) {
					copies[uint64(a-mem.Start)/page] = read(a)
					pages++
				}
			}
			return pages
		}
		call := p.Run("write", uint64(mem.Start), page, uint64(n), newSeed(t), writes)
		collections, pages := 0, 0
		for !call.Done() {
			pages += update()
			collections++
		}
		call.Value()
		pages += update()
		t.Logf("%d pages in %d collections", pages, collections+1)
		wantCollect(t, w, "at rest")
		if err := w.Stop(); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if now := read(mem.Page(i).Start); now != copies[i] {
				t.Fatalf("page %d: %x, last collected as %x", i, now, copies[i])
			}
		}
	})
}

// TestWritesRemoved discards pages, or punches holes into shared memory. That need
// not count. The writes that follow do.
func TestWritesRemoved(t *testing.T) {
	eachMemory(t, 8, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		advice := unix.MADV_DONTNEED
		if mem.Kind.Shared() {
			advice = unix.MADV_REMOVE
		}
		p.Fill(mem.Range, 1).Value()
		w := startWrites(t, f, p.Pid, mem.Range)
		hole := uffd.Range{Start: mem.Page(2).Start, Len: 3 * mem.Page(2).Len}
		p.Madvise(hole, advice).Value()
		for range 2 {
			for _, r := range collect(t, w) {
				if r.Start < hole.Start || r.End() > hole.End() {
					t.Errorf("collected %v, the hole is %v", r, hole)
				}
			}
		}
		p.Load(mem.Page(2).Start).Value()
		wantCollect(t, w, "read")
		p.Store(mem.Page(2).Start, 2).Value()
		p.Store(mem.Page(3).Start, 2).Value()
		wantCollect(t, w, "written", mem.Page(2), mem.Page(3))
		wantCollect(t, w, "nothing since")
	})
}

// TestWritesMappings tracks memory of several mappings, with a hole.
func TestWritesMappings(t *testing.T) {
	for _, method := range []Method{Async, Sync} {
		t.Run(method.String(), func(t *testing.T) {
			require(t, method, uffdtest.Anon)
			p := uffdtest.Start(t)
			mem, other := p.Map(uffdtest.Anon, 12), p.Map(uffdtest.Anon, 3)
			p.Mprotect(mem.Page(2), unix.PROT_READ).Value()
			p.Munmap(mem.Page(5)).Value()
			first, second := mem.Range, other.Range
			if second.Start < first.Start {
				first, second = second, first
			}
			w := startWrites(t, openIn(p, method), p.Pid, second, first)
			p.Store(mem.Page(1).Start, 1).Value()
			p.Mprotect(mem.Page(2), readWrite).Value()
			p.Mprotect(mem.Page(3), unix.PROT_READ).Value()
			p.Store(mem.Page(2).Start, 1).Value()
			p.Store(mem.Page(7).Start, 1).Value()
			p.Munmap(mem.Page(8)).Value()
			p.Fill(other.Range, 1).Value()
			want := []uffd.Range{mem.Page(1), mem.Page(2), mem.Page(7), other.Range}
			slices.SortFunc(want, func(a, b uffd.Range) int { return int(int64(a.Start - b.Start)) })
			wantCollect(t, w, "written", want...)
			wantCollect(t, w, "nothing since")
			p.Store(mem.Page(7).Start, 2).Value()
			wantCollect(t, w, "again", mem.Page(7))
			if err := w.Stop(); err != nil {
				t.Fatal(err)
			}
			p.Fill(other.Range, 2).Value()
			p.Store(mem.Page(1).Start, 2).Value()
			if flags := p.VMFlags(mem.Page(1).Start); strings.Contains(flags, "uw") {
				t.Errorf("still registered after Stop: %s", flags)
			}
		})
	}
}

func TestWritesGone(t *testing.T) {
	for i, method := range []Method{Async, Sync, Async, Sync} {
		write := i >= 2
		t.Run(fmt.Sprintf("%v/written=%v", method, write), func(t *testing.T) {
			require(t, method, uffdtest.Anon)
			p := uffdtest.Start(t)
			mem := p.Map(uffdtest.Anon, 4)
			w := startWrites(t, openIn(p, method), p.Pid, mem.Range)
			if write {
				p.Fill(mem.Range, 1).Value()
			}
			p.Kill()
			if err := lastError(w); !errors.Is(err, uffd.ErrGone) {
				t.Errorf("Collect: %v, want ErrGone", err)
			}
			if err := w.Stop(); err != nil {
				t.Errorf("Stop: %v", err)
			}
		})
	}
}

// TestWritesFail has the process go on where its faults cannot be answered.
func TestWritesFail(t *testing.T) {
	require(t, Sync, uffdtest.Anon)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 4)
	w := startWrites(t, openIn(p, Sync), p.Pid, mem.Range)
	p.Store(mem.Start, 1).Value()
	w.faults.fail(unix.EIO)
	p.Fill(mem.Range, 2).Value()
	if err := lastError(w); !errors.Is(err, unix.EIO) {
		t.Errorf("Collect: %v, want EIO", err)
	}
}

// TestWritesFailed has nobody wait after the tracking has failed.
func TestWritesFailed(t *testing.T) {
	require(t, Sync, uffdtest.Anon)
	uffdtest.Require(t, uffd.FeatureEventRemove)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 8)
	w := startWrites(t, openIn(p, Sync), p.Pid, mem.Range)
	w.faults.mu.Lock()
	w.faults.failed = unix.EIO // while the memory is registered
	w.faults.mu.Unlock()
	for i := range 4 {
		p.Madvise(mem.Page(i), unix.MADV_DONTNEED).Value()
	}
	w.faults.fail(unix.EIO)
	p.Fill(mem.Range, 1).Value()
}

// TestStartFails has the process go on that waits for an event to be read.
func TestStartFails(t *testing.T) {
	require(t, Sync, uffdtest.Anon)
	uffdtest.Require(t, uffd.FeatureEventRemove)
	p := uffdtest.Start(t)
	mem, busy, extra := p.Map(uffdtest.Anon, 4), p.Map(uffdtest.Anon, 4), p.Map(uffdtest.Anon, 1)
	f, other := openIn(p, Sync), openIn(p, Sync)
	defer f.Close()
	defer other.Close()
	if _, err := f.Register(extra.Range, uffd.RegisterWP); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Register(busy.Range, uffd.RegisterWP); err != nil {
		t.Fatal(err)
	}
	discarding := p.Madvise(extra.Range, unix.MADV_DONTNEED)
	awaitMessage(t, f)
	if _, err := Start(f, p.Pid, mem.Range, busy.Range); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("Start: %v, want EBUSY", err)
	}
	discarding.Value()
	if flags := p.VMFlags(mem.Start); strings.Contains(flags, "uw") {
		t.Errorf("still registered: %s", flags)
	}

	// An event that came too late for answer.
	discarding = p.Madvise(extra.Range, unix.MADV_DONTNEED)
	awaitMessage(t, f)
	s := &faults{file: f, done: make(chan struct{})}
	close(s.done)
	s.interrupt()
	discarding.Value()
}

// TestWritesLeaving collects a page between the announcement that it is discarded
// and its end. No event says when that is: without FeatureEventRemove the test
// makes the announcement.
func TestWritesLeaving(t *testing.T) {
	require(t, Sync, uffdtest.Anon)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2*maxRun)
	p.Madvise(mem.Range, unix.MADV_NOHUGEPAGE).Value()
	p.Fill(mem.Range, 1).Value()
	w := startWrites(t, p.Open(&uffd.Config{Require: uffd.FeaturePagefaultFlagWP}), p.Pid, mem.Range)
	first, second, third := mem.Page(3), mem.Page(maxRun-1), mem.Page(maxRun)
	for _, r := range []uffd.Range{first, second, third} {
		w.faults.discarded(r)
	}
	p.Store(mem.Page(4).Start, 2).Value()
	wantCollect(t, w, "announced", first, mem.Page(4), second, third)
	wantCollect(t, w, "still there", first, second, third)
	p.Store(second.Start, 2).Value() // MADV_FREE does not take that
	p.Madvise(first, unix.MADV_DONTNEED).Value()
	wantCollect(t, w, "gone or written", first, second, third)
	wantCollect(t, w, "the other is still there", third)
	p.Madvise(third, unix.MADV_DONTNEED).Value()
	p.Store(third.Start, 3).Value()
	wantCollect(t, w, "gone, and written", third)
	wantCollect(t, w, "nothing since")
	p.Load(first.Start).Value()
	wantCollect(t, w, "read")
}

// TestStopOvertakes stops the tracking while a collection is under way. What it
// cannot find any more is not to be taken for not written.
func TestStopOvertakes(t *testing.T) {
	for _, method := range []Method{Async, Sync} {
		t.Run(method.String(), func(t *testing.T) {
			require(t, method, uffdtest.Anon)
			p := uffdtest.Start(t)
			mem := p.Map(uffdtest.Anon, 6)
			p.Munmap(mem.Page(2)).Value()
			ranges := []uffd.Range{{Start: mem.Start, Len: mem.Page(0).Len * 2}, {Start: mem.Page(3).Start, Len: mem.Page(0).Len * 3}}
			w := startWrites(t, openIn(p, method), p.Pid, ranges...)
			overtake(t, p, w, w.file, ranges)
		})
	}
}

// overtake stops w in a collection between two ranges, whose memory has been
// used, but keeps it from closing anything.
func overtake(t *testing.T, p *uffdtest.Process, w tracker, f *uffd.File, ranges []uffd.Range) {
	for _, r := range ranges {
		p.Fill(r, 1).Value()
	}
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	holding, over := make(chan struct{}), make(chan struct{})
	all.Go(func() {
		conn.Control(func(uintptr) { // Close waits for it
			close(holding)
			<-over
		})
	})
	<-holding
	var last error
	first := true
	for _, err := range w.Collect() {
		last = err
		if !first {
			continue
		}
		first = false
		all.Go(func() { w.Stop() })
		for end := time.Now().Add(uffdtest.Patience); ; time.Sleep(time.Millisecond) {
			flags := strings.Fields(p.VMFlags(ranges[len(ranges)-1].Start))
			if !slices.ContainsFunc([]string{"uw", "um", "ur"}, func(s string) bool { return slices.Contains(flags, s) }) {
				break
			}
			if time.Now().After(end) {
				t.Error("Stop does not unregister the memory")
				break
			}
		}
	}
	close(over)
	all.Wait()
	if !errors.Is(last, os.ErrClosed) {
		t.Errorf("the last pair of the collection has %v, want ErrClosed", last)
	}
}

func TestWritesOwn(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	m := anonymous(t, 64)
	f, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	w := startWrites(t, f, 0, m.span(0, 60))
	if w.Method() != Async {
		t.Errorf("Method = %v", w.Method())
	}
	m.write(3, 9)
	m.write(58, 64)
	for _, err := range w.Collect() {
		if err != nil {
			t.Fatal(err)
		}
		for _, err := range w.Collect() {
			if !errors.Is(err, unix.EINVAL) {
				t.Errorf("Collect in a Collect: %v", err)
			}
		}
		break
	}
	wantCollect(t, w, "the rest", m.span(58, 60))
	m.write(3, 9)
	m.write(58, 64)
	func() {
		defer func() { recover() }()
		for range w.Collect() {
			panic("in a loop")
		}
	}()
	wantCollect(t, w, "the rest after a panic", m.span(58, 60))
	m.write(0, 1)
	wantCollect(t, w, "written", m.span(0, 1))
}

// TestWritesMany collects more than fits into one scan.
func TestWritesMany(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	m := anonymous(t, 20000)
	f, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	w := startWrites(t, f, 0, m.r())
	var want []uffd.Range
	for i := 0; i < m.pages(); i += 2 {
		m.write(i, i+1)
		want = append(want, m.span(i, i+1))
	}
	if len(want) < 2*len(w.collector.buf) {
		t.Fatalf("%d ranges do not need several scans", len(want))
	}
	if got := collect(t, w); !slices.Equal(got, want) {
		t.Errorf("%d ranges are written, want %d", len(got), len(want))
	}
	wantCollect(t, w, "nothing since")
}

// TestCollectFails has a scan fail: what was collected before does not come again.
func TestCollectFails(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureWPAsync)
	m := anonymous(t, 64)
	f, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	w := startWrites(t, f, 0, m.r())
	for i := range 20 {
		m.write(3*i, 3*i+1)
	}
	if got := collect(t, w); len(got) != 20 {
		t.Fatalf("%d ranges are written, want 20", len(got))
	}
	m.write(5, 6)
	outside := uffd.Range{Start: 1 << 63, Len: uint64(m.page)}
	w.ranges = []uffd.Range{m.r(), outside}
	defer func() { w.ranges = w.ranges[:1] }()
	var got []uffd.Range
	for r, err := range w.Collect() {
		if err == nil {
			got = append(got, r)
		} else if !errors.Is(err, unix.EFAULT) {
			t.Errorf("Collect: %v, want EFAULT", err)
		}
	}
	if !slices.Equal(got, []uffd.Range{m.span(5, 6)}) {
		t.Errorf("collected %v, want %v", got, m.span(5, 6))
	}
}

func TestStartErrors(t *testing.T) {
	uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
	m := anonymous(t, 8)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 8)
	// Below vm.mmap_min_addr, where the process's own runtime maps nothing either.
	hole := uffd.Range{Start: uffd.Addr(os.Getpagesize()), Len: uint64(os.Getpagesize())}
	sync := func() *uffd.File { return openIn(p, Sync) }
	async := func() *uffd.File { return openIn(p, Async) }
	own := func(features uffd.Features) func() *uffd.File {
		return func() *uffd.File {
			f, err := uffd.New(&uffd.Config{Require: features})
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	for _, c := range []struct {
		name   string
		needs  uffd.Features
		open   func() *uffd.File
		pid    int
		ranges []uffd.Range
		err    error
		says   string
	}{
		{"own sync", 0, own(0), 0, []uffd.Range{m.r()}, errors.ErrUnsupported, "Linux 6.7"},
		{"own sync by pid", 0, own(0), os.Getpid(), []uffd.Range{m.r()}, errors.ErrUnsupported, "its own writes"},
		{"overlap", 0, sync, p.Pid, []uffd.Range{mem.Page(1), mem.Range}, unix.EINVAL, "overlap"},
		{"part of a page", 0, sync, p.Pid, []uffd.Range{{Start: mem.Start, Len: 5}}, unix.EINVAL, "whole pages"},
		{"empty", 0, sync, p.Pid, []uffd.Range{{Start: mem.Start}}, unix.EINVAL, "whole pages"},
		{"overflow", 0, sync, p.Pid, []uffd.Range{{Start: mem.Start, Len: -uint64(os.Getpagesize())}}, unix.EINVAL, "whole pages"},
		{"nothing mapped", 0, sync, p.Pid, []uffd.Range{mem.Range, hole}, unix.EINVAL, "nothing is mapped"},
		{"no process", 0, sync, 1 << 30, []uffd.Range{mem.Range}, os.ErrNotExist, ""},
		{"events", 0, func() *uffd.File { return p.Open(&uffd.Config{Require: uffd.FeatureEventUnmap}) }, p.Pid,
			[]uffd.Range{mem.Range}, unix.EINVAL, "EVENT_UNMAP"},
		{"nothing mapped, async", uffd.FeatureWPAsync, async, p.Pid, []uffd.Range{mem.Range, hole}, unix.EINVAL, ""},
		{"another process", uffd.FeatureWPAsync, own(uffd.FeatureWPAsync), p.Pid, []uffd.Range{m.r()}, unix.EINVAL, "belongs to another"},
		{"remove events, async", uffd.FeatureWPAsync, own(uffd.FeatureWPAsync | uffd.FeatureEventRemove), 0,
			[]uffd.Range{m.r()}, unix.EINVAL, "EVENT_REMOVE"},
	} {
		t.Run(c.name, func(t *testing.T) {
			uffdtest.Require(t, c.needs)
			f := c.open()
			defer f.Close()
			w, err := Start(f, c.pid, c.ranges...)
			if w != nil || !errors.Is(err, c.err) || !strings.Contains(fmt.Sprint(err), c.says) {
				t.Fatalf("Start = %v, %v; want %v that says %q", w != nil, err, c.err, c.says)
			}
			if f.Features().Has(uffd.FeatureWPAsync) || c.pid != p.Pid {
				return
			}
			// The File is the caller's, and nothing is registered with it.
			if flags := p.VMFlags(mem.Start); strings.Contains(flags, "uw") {
				t.Errorf("still registered: %s", flags)
			}
			w, err = Start(f, p.Pid, mem.Page(2))
			if f.Features()&events&^uffd.FeatureEventRemove == 0 && err != nil {
				t.Errorf("Start after a failure: %v", err)
			}
			if w != nil {
				p.Store(mem.Page(2).Start, 1).Value()
				wantCollect(t, w, "after a failure", mem.Page(2))
				w.Stop()
			}
		})
	}
}

func TestOpen(t *testing.T) {
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	f, err := Open()
	switch {
	case offered.Has(uffd.FeatureWPAsync):
		if err != nil || !f.Features().Has(uffd.FeatureWPAsync) {
			t.Fatalf("Open = %v, %v", f, err)
		}
	case !offered.Has(uffd.FeaturePagefaultFlagWP):
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Fatalf("Open on a kernel that offers %v: %v", offered, err)
		}
		return
	}
	if f != nil {
		f.Close()
	}

	// This kernel may offer more than it has.
	f, err = openSync()
	if err == nil {
		if f.Features()&^uffd.FeatureEventRemove != uffd.FeaturePagefaultFlagWP {
			t.Errorf("openSync enables %v", f.Features())
		}
		f.Close()
		uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
	} else if !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}

func TestParseAreas(t *testing.T) {
	const smaps = `7f0000000000-7f0000004000 rw-p 00000000 00:00 0 
Size:                 16 kB
KernelPageSize:        4 kB
Rss:                   4 kB
7f0000004000-7f0000006000 rw-s 00000000 00:01 1042                       /memfd:a b (deleted)
Size:                  8 kB
KernelPageSize:        4 kB
VmFlags: rd wr
7f0000200000-7f0000600000 rw-p 00000000 00:0f 1043                       /anon_hugepage (deleted)
KernelPageSize:     2048 kB
`
	const base = uffd.Addr(0x7f0000000000)
	span := func(from, to uffd.Addr) uffd.Range { return uffd.Range{Start: base + from, Len: uint64(to - from)} }
	for _, c := range []struct {
		ranges []uffd.Range
		want   []area
		err    bool
	}{
		{nil, nil, false},
		{[]uffd.Range{span(0x1000, 0x3000)}, []area{{Range: span(0x1000, 0x3000), page: 4096, anonymous: true}}, false},
		{[]uffd.Range{span(0, 0x1000), span(0x2000, 0x400000)}, []area{
			{Range: span(0, 0x1000), page: 4096, anonymous: true},
			{Range: span(0x2000, 0x4000), page: 4096, anonymous: true},
			{Range: span(0x4000, 0x6000), page: 4096},
			{Range: span(0x200000, 0x400000), page: 2 << 20},
		}, false},
		{[]uffd.Range{span(0x7000, 0x8000)}, nil, true},
		{[]uffd.Range{span(0x201000, 0x400000)}, nil, true},
	} {
		got, err := parseAreas(smaps, c.ranges)
		if (err != nil) != c.err || !slices.EqualFunc(got, c.want, func(a, b area) bool {
			return a.Range == b.Range && a.page == b.page && a.anonymous == b.anonymous
		}) {
			t.Errorf("parseAreas(%v) = %v, %v; want %v", c.ranges, got, err, c.want)
		}
	}
}

// TestRun compares runs of random bits with a plain loop.
func TestRun(t *testing.T) {
	random := rand.New(rand.NewPCG(newSeed(t), 0))
	for range 200 {
		n := random.Uint64N(3 * maxRun)
		words := make([]uint64, (n+63)/64)
		var want, got []uint64
		p := random.Float64()
		p *= p
		on := false
		for i := range n {
			if random.Float64() < p {
				on = !on
			}
			if on {
				words[i/64] |= 1 << (i % 64)
				want = append(want, i)
			}
		}
		for i := uint64(0); i < n; {
			first, end := run(words, i, n)
			if first < i || end > n || end-first > maxRun || first == end && end != n {
				t.Fatalf("run from %d of %d = %d, %d", i, n, first, end)
			}
			for k := first; k < end; k++ {
				got = append(got, k)
			}
			i = end
		}
		if !slices.Equal(got, want) {
			t.Fatalf("runs of %d bits differ", n)
		}
	}
}
