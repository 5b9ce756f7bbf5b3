package evict

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// A way to find out which pages are used.
type way struct {
	name     string
	features uffd.Features
}

var ways = []way{{"wp", Features}, {"rwp", Features | PreferredFeatures}}

func (w way) rwp() bool { return w.features.Has(PreferredFeatures) }

// eachWay runs a test for each way that the kernel offers.
func eachWay(t *testing.T, test func(t *testing.T, w way)) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			uffdtest.Require(t, w.features)
			test(t, w)
		})
	}
}

// A setup is a Region of another process.
type setup struct {
	*Region
	way     way
	p       *uffdtest.Process
	mem     uffdtest.Memory
	file    *os.File
	backing *os.File
	serving chan error
}

func mapShared(t testing.TB, p *uffdtest.Process, pages int) (uffdtest.Memory, *os.File) {
	t.Helper()
	mem := p.Map(uffdtest.Shmem, pages)
	p.Madvise(mem.Range, unix.MADV_DONTFORK).Value()
	file, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", p.Pid, mem.FD), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return mem, file
}

func backingFile(t testing.TB) *os.File {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "backing"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

// start puts memory of pages under a limit, in pages, and serves it.
func start(t testing.TB, w way, pages, limit int, before func(s *setup)) *setup {
	t.Helper()
	s := prepare(t, w, pages, limit, before)
	s.serve(t)
	return s
}

func (s *setup) serve(t testing.TB) {
	go func() { s.serving <- s.Serve(t.Context()) }()
	t.Cleanup(func() {
		s.p.Kill()
		if err := <-s.serving; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
}

func prepare(t testing.TB, w way, pages, limit int, before func(s *setup)) *setup {
	t.Helper()
	s := &setup{way: w, p: uffdtest.Start(t), backing: backingFile(t), serving: make(chan error, 1)}
	s.mem, s.file = mapShared(t, s.p, pages)
	if before != nil {
		before(s)
	}
	var err error
	s.Region, err = New(s.p.Open(&uffd.Config{Require: w.features}), s.p.Pid, Config{
		Range:     s.mem.Range,
		File:      s.file,
		Backing:   s.backing,
		Limit:     int64(limit * os.Getpagesize()),
		ErrorHook: func(err error) { t.Error(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.p.Kill()
		if err := s.Stop(); err != nil {
			t.Errorf("Stop: %v", err)
		}
	})
	return s
}

// held returns how many pages the file has in memory.
func (s *setup) held(t testing.TB) int {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Fstat(int(s.file.Fd()), &stat); err != nil {
		t.Fatal(err)
	}
	return int(stat.Blocks) * 512 / os.Getpagesize()
}

// settled returns the numbers once the last page that came is counted, which is
// after the thread goes on that waited for it.
func (s *setup) settled(t testing.TB) Stats {
	t.Helper()
	for end := time.Now().Add(uffdtest.Patience); ; time.Sleep(time.Millisecond) {
		stats := s.Stats()
		if stats.Resident == int64(s.held(t)*os.Getpagesize()) {
			return stats
		}
		if time.Now().After(end) {
			t.Fatalf("%d pages in memory, %+v", s.held(t), stats)
		}
	}
}

func TestRegion(t *testing.T) { eachWay(t, testRegion) }

func testRegion(t *testing.T, w way) {
	const pages, limit = 100, 20
	s := start(t, w, pages, limit, func(s *setup) {
		s.p.Fill(uffd.Range{Start: s.mem.Start, Len: s.mem.Len / 2}, 1).Value()
	})
	least := limit - 1 // with RWP pages leave in pairs here
	if w.rwp() {
		least--
	}
	if n := s.held(t); n < least || n > limit-1 {
		t.Errorf("%d pages in memory after New, limit %d", n, limit)
	}
	half := pages / 2
	for i := range pages {
		want := byte(0)
		if i < half {
			want = 1
		}
		if bad := s.p.Check(s.mem.Page(i), want).Value(); bad != 0 {
			t.Fatalf("page %d: %d bytes differ", i, bad)
		}
		if n := s.held(t); n > limit {
			t.Fatalf("%d pages in memory, limit %d", n, limit)
		}
	}
	before := s.Stats()
	for i := range pages {
		s.p.Fill(s.mem.Page(i), byte(i+2)).Value()
	}
	for i := range pages {
		if bad := s.p.Check(s.mem.Page(i), byte(i+2)).Value(); bad != 0 {
			t.Fatalf("page %d: %d bytes differ", i, bad)
		}
	}
	stats := s.settled(t)
	if n := s.held(t); n < least || n > limit-1 || stats.Resident != int64(n*os.Getpagesize()) || stats.Limit != int64(limit*os.Getpagesize()) {
		t.Errorf("%d pages in memory, %+v", n, stats)
	}
	// What was only read is not written again: reading everything twice costs
	// no more than what was dirty.
	if n := stats.Written - before.Written; n != pages || stats.Back == 0 || before.Written != uint64(half) {
		t.Errorf("%d pages were written to the backing file for %d that changed; before %+v, now %+v", n, pages, before, stats)
	}
	for i := range pages {
		s.p.Load(s.mem.Page(i).Start).Value()
	}
	if again := s.Stats(); again.Written != stats.Written || again.Evicted == stats.Evicted {
		t.Errorf("reading wrote: %+v, then %+v", stats, again)
	}
}

// TestHot has some pages used all the time.
func TestHot(t *testing.T) { eachWay(t, testHot) }

func testHot(t *testing.T, w way) {
	const pages, limit, hot = 400, 64, 16
	s := start(t, w, pages, limit, nil)
	missed := func() uint64 {
		before := s.settled(t).Came
		for i := range hot {
			s.p.Store(s.mem.Page(i).Start, 1).Value()
		}
		return s.settled(t).Came - before
	}
	cold := hot
	var last uint64 // of them, in the second half
	for round := range 60 {
		if n := missed(); round >= 30 {
			last += n
		}
		for range 20 {
			s.p.Load(s.mem.Page(cold).Start).Value()
			if cold++; cold == pages {
				cold = hot
			}
		}
	}
	t.Logf("%d missing, %+v", last, s.Stats())
	most := uint64(hot) // first in, first out would miss each of them every few rounds
	if w.rwp() {
		most = 0
	}
	if last > most {
		t.Errorf("%d times one of %d pages was missing that are used all the time: %+v", last, hot, s.Stats())
	}
	if kept := s.Stats().Kept; kept > 0 != w.rwp() {
		t.Errorf("%d times a page stayed", kept)
	}
	if n := s.client.Stats().RWProtected; n != 0 {
		t.Errorf("%d faults because of the sampling", n)
	}
}

// TestAllHot has all pages used before one is to leave.
func TestAllHot(t *testing.T) {
	const limit = 16
	w := ways[1]
	uffdtest.Require(t, w.features)
	s := start(t, w, 64, limit, nil)
	for range 2 {
		for i := range limit - 1 {
			s.p.Load(s.mem.Page(i).Start).Value()
			s.settled(t)
		}
	}
	if n := s.Stats(); n.Came != limit-1 || n.Evicted != 0 {
		t.Fatalf("%+v", n)
	}
	s.p.Load(s.mem.Page(limit).Start).Value()
	if n := s.settled(t); n.Kept != chances || n.Evicted != 1 || s.held(t) != limit-1 {
		t.Errorf("%d pages in memory, %+v; want %d that stayed", s.held(t), n, chances)
	}
}

// TestAllocs has pages leave that are used and others that are not: threads wait
// meanwhile.
func TestAllocs(t *testing.T) { eachWay(t, testAllocs) }

func testAllocs(t *testing.T, w way) {
	const pages = 200
	s := prepare(t, w, pages, 2*pages, func(s *setup) { s.p.Fill(s.mem.Range, 9).Value() })
	for i := 0; i < pages; i += 2 {
		s.p.Load(s.mem.Page(i).Start).Value()
	}
	const runs = 5
	n := testing.AllocsPerRun(runs, func() {
		if err := s.memory.makeRoom(); err != nil {
			t.Fatal(err)
		}
	})
	stats := s.Stats()
	if n != 0 || stats.Evicted < runs || stats.Written != stats.Evicted || stats.Kept > 0 != w.rwp() {
		t.Errorf("%v allocations, %+v", n, stats)
	}
}

// TestEvictionHolds has threads store to a page after it was copied to the backing
// file, and before it leaves.
func TestEvictionHolds(t *testing.T) { eachWay(t, testEvictionHolds) }

func testEvictionHolds(t *testing.T, w way) {
	nothing := func(*setup, uffd.Range) {}
	read := func(s *setup, page uffd.Range) { s.p.Load(page.Start).Value() }
	unmap := func(s *setup, page uffd.Range) { s.p.Madvise(page, unix.MADV_DONTNEED).Value() }
	bar := func(s *setup, page uffd.Range) { s.p.Mprotect(page, unix.PROT_NONE).Value() }
	unbar := func(s *setup, page uffd.Range) { s.p.Mprotect(page, unix.PROT_READ|unix.PROT_WRITE).Value() }
	states := []struct {
		name          string
		before, after func(s *setup, page uffd.Range) // it is saved
	}{
		{"protected", nothing, nothing},
		{"read", read, nothing},
		{"not mapped any more", unmap, nothing},
		{"read, and not mapped any more", func(s *setup, page uffd.Range) { read(s, page); unmap(s, page) }, nothing},
		{"not mapped any more once it is saved", read, unmap},
		{"inaccessible for a while", func(s *setup, page uffd.Range) { read(s, page); bar(s, page) }, unbar},
		{"never mapped", nothing, nothing},
	}
	s := prepare(t, w, 20, 40, func(s *setup) {
		for i := range states {
			s.p.Fill(s.mem.Page(i), 9).Value()
		}
		last := int64((len(states) - 1) * os.Getpagesize())
		if err := punch(s.file, last, int64(os.Getpagesize())); err != nil {
			t.Fatal(err)
		}
		if _, err := s.file.WriteAt(bytes.Repeat([]byte{9}, os.Getpagesize()), last); err != nil {
			t.Fatal(err)
		}
	})
	m := &s.memory
	var stores []*uffdtest.Call
	for i, state := range states {
		page := s.mem.Page(i)
		off := int64(i * os.Getpagesize())
		state.before(s, page)
		if w.rwp() {
			if err := m.setMode(0, uffd.FeatureRWPAsync); err != nil {
				t.Fatal(err)
			}
		}
		if written, err := m.save(off); !written || err != nil {
			t.Fatalf("save of a page that is %s: %v, %v", state.name, written, err)
		}
		state.after(s, page)
		store := s.p.Store(page.Start, 77)
		for {
			if store.Done() {
				t.Fatalf("a page that is %s was written after it was saved", state.name)
			}
			m.uffd.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			msg, err := m.uffd.ReadMsg()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if fault, ok := msg.Pagefault(); ok && fault.Addr == page.Start { // others ask again for pages that have left
				break
			}
		}
		m.uffd.SetReadDeadline(time.Time{})
		if err := m.evict(&m.cold); err != nil {
			t.Fatal(err)
		}
		if w.rwp() {
			if err := m.setMode(uffd.FeatureRWPAsync, 0); err != nil {
				t.Fatal(err)
			}
		}
		stores = append(stores, store)
	}
	m.uffd.Wake(s.mem.Range) // the messages were read
	s.serve(t)
	for i, store := range stores {
		store.Value()
		if bad := s.p.Check(s.mem.Page(i), 9).Value(); bad != 1 {
			t.Errorf("a page that was %s: %d bytes differ, want the one that was stored", states[i].name, bad)
		}
	}
	written := 0 // it is in the backing file already
	if !w.rwp() {
		written = len(states) // they are taken to differ
	}
	if stats := s.Stats(); stats.Written != uint64(written) || stats.Evicted != uint64(len(states)) || stats.Back != stats.Evicted {
		t.Errorf("%+v", stats)
	}
}

const threads = 6

// "use" has several threads write to words of their own in each page, and look
// that they are as they left them. It returns how many were not.
var _ = uffdtest.Handle("use", func(args []uint64) ([]uint64, error) {
	start, pages, seed, uses, zipf, unmap := args[0], args[1], args[2], args[3], args[4] != 0, args[5] != 0
	page := uint64(os.Getpagesize())
	var lost atomic.Uint64
	var all sync.WaitGroup
	for w := range uint64(threads) {
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, w))
			skewed := rand.NewZipf(random, 1.1, 1, pages-1)
			shadow := make([]uint64, pages)
			for n := range uses {
				i := random.Uint64N(pages)
				if zipf {
					i = skewed.Uint64() * 7919 % pages // hot pages everywhere
				}
				word := uffdtest.BytesAt(start+i*page+(w*page/threads)&^7, 8)
				if binary.NativeEndian.Uint64(word) != shadow[i] {
					lost.Add(1)
				}
				if random.IntN(3) > 0 {
					shadow[i] = n<<8 | w
					binary.NativeEndian.PutUint64(word, shadow[i])
				}
				if unmap && random.IntN(8) == 0 { // of shared memory nothing is lost by that
					if err := unix.Madvise(uffdtest.BytesAt(start+random.Uint64N(pages)*page, page), unix.MADV_DONTNEED); err != nil {
						panic(err)
					}
				}
			}
			for i := range pages {
				if binary.NativeEndian.Uint64(uffdtest.BytesAt(start+i*page+(w*page/threads)&^7, 8)) != shadow[i] {
					lost.Add(1)
				}
			}
		})
	}
	all.Wait()
	return []uint64{lost.Load()}, nil
})

// TestNothingIsLost has several threads use more memory than may be there.
func TestNothingIsLost(t *testing.T) { eachWay(t, testNothingIsLost) }

func testNothingIsLost(t *testing.T, w way) {
	uses := uint64(15_000)
	if testing.Short() {
		uses = 1000
	}
	for _, c := range []struct {
		pages, limit int
		zipf, unmap  uint64
	}{
		{20, 16, 0, 0},
		{40, 32, 0, 1},
		{1000, 250, 0, 0},
		{1000, 250, 1, 0},
		{1000, 250, 1, 1},
		{3000, 100, 1, 0},
	} {
		t.Run(fmt.Sprintf("%d of %d pages, zipf %d, unmapped %d", c.limit, c.pages, c.zipf, c.unmap), func(t *testing.T) {
			s := start(t, w, c.pages, c.limit, nil)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			call := s.p.Run("use", uint64(s.mem.Start), uint64(c.pages), seed, uses, c.zipf, c.unmap)
			most := 0
			for !call.Done() {
				most = max(most, s.held(t))
				time.Sleep(time.Millisecond) // two processors have enough to do
			}
			if lost := call.Value(); lost != 0 {
				t.Errorf("%d words were lost", lost)
			}
			stats := s.Stats()
			t.Logf("at most %d pages in memory, %+v", most, stats)
			if most > c.limit {
				t.Errorf("%d pages in memory, limit %d", most, c.limit)
			}
			if stats.Evicted == 0 || stats.Back == 0 {
				t.Errorf("nothing was evicted: %+v", stats)
			}
			if stats.Kept > 0 != w.rwp() {
				t.Errorf("%d times a page stayed", stats.Kept)
			}
		})
	}
}

// TestSystemCalls has the kernel read and write pages that are not there.
func TestSystemCalls(t *testing.T) {
	uffdtest.RequireAllFaults(t)
	eachWay(t, testSystemCalls)
}

func testSystemCalls(t *testing.T, w way) {
	s := start(t, w, 64, 16, nil)
	s.p.Fill(s.mem.Range, 9).Value()
	got := make([]byte, s.mem.Len)
	local := []unix.Iovec{{Base: &got[0]}}
	local[0].SetLen(len(got))
	remote := []unix.RemoteIovec{{Base: uintptr(s.mem.Start), Len: len(got)}}
	n, err := unix.ProcessVMReadv(s.p.Pid, local, remote, 0)
	if err != nil || !bytes.Equal(got[:n], bytes.Repeat([]byte{9}, len(got))) {
		t.Errorf("process_vm_readv: %d of %d bytes, %v", n, len(got), err)
	}
	if held := s.held(t); held > 16 {
		t.Errorf("%d pages in memory", held)
	}
}

// TestDiscarded has the process discard a page that is in memory.
func TestDiscarded(t *testing.T) { eachWay(t, testDiscarded) }

func testDiscarded(t *testing.T, w way) {
	s := start(t, w, 64, 16, nil)
	s.p.Fill(s.mem.Range, 9).Value()
	first := s.mem.Page(0)
	s.p.Load(first.Start).Value() // it comes back, and differs not from the backing file
	s.p.Madvise(first, unix.MADV_REMOVE).Value()
	for i := 1; i < 10; i++ {
		if bad := s.p.Check(s.mem.Page(i), 9).Value(); bad != 0 {
			t.Errorf("page %d: %d bytes differ", i, bad)
		}
	}
	if bad := s.p.Check(first, 0).Value(); bad != 0 {
		t.Errorf("%d bytes are not zero", bad)
	}
	for i := 1; i < 64; i++ {
		if bad := s.p.Check(s.mem.Page(i), 9).Value(); bad != 0 {
			t.Errorf("page %d: %d bytes differ", i, bad)
		}
	}
	if bad := s.p.Check(first, 0).Value(); bad != 0 {
		t.Errorf("after it was evicted: %d bytes are not zero", bad)
	}

	// One that leaves before it is touched again.
	second := s.mem.Page(1)
	s.p.Load(second.Start).Value()
	s.p.Madvise(second, unix.MADV_REMOVE).Value()
	for range 2 {
		for i := 2; i < 64; i++ {
			s.p.Load(s.mem.Page(i).Start).Value()
		}
	}
	if bad := s.p.Check(second, 0).Value(); bad != 0 {
		t.Errorf("evicted at once: %d bytes are not zero", bad)
	}
}

// TestMprotect has pages leave that the process cannot access just now.
func TestMprotect(t *testing.T) { eachWay(t, testMprotect) }

func testMprotect(t *testing.T, w way) {
	const pages, limit, barred = 40, 16, 8
	s := start(t, w, pages, limit, nil)
	for i := range barred {
		s.p.Fill(s.mem.Page(i), 9).Value()
	}
	first := uffd.Range{Start: s.mem.Start, Len: barred * s.mem.Page(0).Len}
	s.p.Mprotect(first, unix.PROT_NONE).Value()
	for i := barred; i < pages; i++ {
		s.p.Fill(s.mem.Page(i), 9).Value()
	}
	if n := s.held(t); n > limit {
		t.Errorf("%d pages in memory, limit %d", n, limit)
	}
	s.p.Mprotect(first, unix.PROT_READ).Value()
	for i := range pages {
		if bad := s.p.Check(s.mem.Page(i), 9).Value(); bad != 0 {
			t.Errorf("page %d: %d bytes differ", i, bad)
		}
	}
}

// TestBackingFails makes the backing file fail: the process gets a signal, and
// never wrong bytes.
func TestBackingFails(t *testing.T) { eachWay(t, testBackingFails) }

func testBackingFails(t *testing.T, w way) {
	uffdtest.Require(t, uffd.FeaturePoison)
	p := uffdtest.Start(t)
	mem, file := mapShared(t, p, 64)
	backing := backingFile(t)
	var failures atomic.Int32
	r, err := New(p.Open(&uffd.Config{Require: w.features}), p.Pid, Config{
		Range: mem.Range, File: file, Backing: backing, Limit: int64(16 * os.Getpagesize()),
		ErrorHook: func(error) { failures.Add(1) },
	})
	if err != nil {
		t.Fatal(err)
	}
	serving := make(chan error, 1)
	go func() { serving <- r.Serve(t.Context()) }()
	p.Fill(mem.Range, 9).Value()
	backing.Close()
	if _, err := p.Load(mem.Start).Result(); err != uffdtest.ErrSigbus {
		t.Errorf("reading a page that cannot be had: %v, want a signal", err)
	}
	if bad := p.Check(mem.Page(63), 9).Value(); bad != 0 {
		t.Errorf("%d bytes of a page that is there differ", bad)
	}
	p.Kill()
	if err := <-serving; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if failures.Load() == 0 { // by now: the signal comes first
		t.Error("ErrorHook was not called")
	}
	r.Stop()
}

func TestNewErrors(t *testing.T) {
	uffdtest.Require(t, Features)
	p := uffdtest.Start(t)
	page := uint64(os.Getpagesize())
	mem, file := mapShared(t, p, 64)
	other, otherFile := mapShared(t, p, 64)
	forked := p.Map(uffdtest.Shmem, 64)
	forkedFile, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", p.Pid, forked.FD), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer forkedFile.Close()
	used := backingFile(t)
	used.WriteString("data")
	noMemory, err := os.Open("/proc/self/status") // temporary files may lie in memory
	if err != nil {
		t.Fatal(err)
	}
	defer noMemory.Close()
	good := Config{Range: mem.Range, File: file, Backing: backingFile(t), Limit: int64(16 * page)}
	for _, c := range []struct {
		name   string
		config *uffd.Config
		change func(c *Config)
		says   string
	}{
		{"features", nil, func(*Config) {}, "lacks"},
		{"events", &uffd.Config{Require: Features | uffd.FeatureEventRemove}, func(*Config) {}, "EVENT_REMOVE"},
		{"limit", nil, func(c *Config) { c.Limit = int64(page) }, "less than 16 pages"},
		{"part of a page", nil, func(c *Config) { c.Range.Len-- }, "whole pages"},
		{"backing in use", nil, func(c *Config) { c.Backing = used }, "4 bytes already"},
		{"another file", nil, func(c *Config) { c.File = otherFile }, "not the file"},
		{"not from the start", nil, func(c *Config) { c.Range = c.Range.Skip(int64(page)) }, "not the file"},
		{"no shared memory", nil, func(c *Config) { c.File = noMemory }, "not shared memory"},
		{"forked", nil, func(c *Config) { c.Range, c.File = forked.Range, forkedFile }, "MADV_DONTFORK"},
		{"not mapped", nil, func(c *Config) { c.Range.Start = uffd.Addr(page) }, "nothing is mapped"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := c.config
			if config == nil && c.name != "features" {
				config = &uffd.Config{Require: Features}
			}
			try := good
			c.change(&try)
			r, err := New(p.Open(config), p.Pid, try)
			if r != nil || !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("New = %v, %v; want EINVAL that says %q", r != nil, err, c.says)
			}
		})
	}
	_ = other
}

// A page that is discarded as soon as it has come back, by the thread that waited for
// it, does not come back once more.
func TestDiscardedAtOnce(t *testing.T) {
	s := prepare(t, ways[0], 64, 16, nil)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	s.p.Fill(s.mem.Range, 9).Value()
	cancel()
	<-served
	page := s.mem.Page(0) // it has left
	s.memory.Borrow(0, os.Getpagesize(), func(p []byte) error {
		if p[0] != 9 {
			t.Fatalf("the page holds %d", p[0])
		}
		_, err := s.memory.uffd.Copy(page.Start, p, uffd.CopyWP)
		if err == nil { // before the pager goes on
			s.p.Madvise(page, unix.MADV_REMOVE).Value()
		}
		return err
	})
	go func() { served <- s.Serve(t.Context()) }()
	if bad := s.p.Check(page, 0).Value(); bad != 0 {
		t.Errorf("%d bytes of what was discarded are back", bad)
	}
	s.p.Kill()
	<-served
}
