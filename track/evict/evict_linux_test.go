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

// A setup is a Region of another process.
type setup struct {
	*Region
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

// start puts memory of pages under a limit, in pages.
func start(t testing.TB, pages, limit int, before func(s *setup)) *setup {
	t.Helper()
	uffdtest.Require(t, Features)
	s := &setup{p: uffdtest.Start(t), backing: backingFile(t), serving: make(chan error, 1)}
	s.mem, s.file = mapShared(t, s.p, pages)
	if before != nil {
		before(s)
	}
	var err error
	s.Region, err = New(s.p.Open(&uffd.Config{Require: Features}), s.p.Pid, Config{
		Range:     s.mem.Range,
		File:      s.file,
		Backing:   s.backing,
		Limit:     int64(limit * os.Getpagesize()),
		ErrorHook: func(err error) { t.Error(err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() { s.serving <- s.Serve(t.Context()) }()
	t.Cleanup(func() {
		s.p.Kill()
		if err := <-s.serving; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
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

func TestRegion(t *testing.T) {
	const pages, limit = 100, 20
	s := start(t, pages, limit, func(s *setup) {
		s.p.Fill(uffd.Range{Start: s.mem.Start, Len: s.mem.Len / 2}, 1).Value()
	})
	if n := s.held(t); n != limit-1 {
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
		s.p.Fill(s.mem.Page(i), byte(i)).Value()
	}
	for i := range pages {
		if bad := s.p.Check(s.mem.Page(i), byte(i)).Value(); bad != 0 {
			t.Fatalf("page %d: %d bytes differ", i, bad)
		}
	}
	stats := s.Stats()
	for end := time.Now().Add(uffdtest.Patience); stats.Resident < int64((limit-1)*os.Getpagesize()) && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // a thread goes on before its page is counted
		stats = s.Stats()
	}
	if n := s.held(t); n != limit-1 || stats.Resident != int64(n*os.Getpagesize()) || stats.Limit != int64(limit*os.Getpagesize()) {
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
func TestHot(t *testing.T) {
	const pages, limit, hot = 400, 64, 16
	s := start(t, pages, limit, nil)
	missed := func() uint64 {
		var n uint64
		for i := range hot {
			before := s.Stats().Came
			s.p.Store(s.mem.Page(i).Start, 1).Value()
			n += s.Stats().Came - before
		}
		return n
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
	if last > hot { // first in, first out would miss each of them every few rounds
		t.Errorf("%d times one of %d pages was missing that are used all the time: %+v", last, hot, s.Stats())
	}
}

const threads = 6

// "use" has several threads write to words of their own in each page, and look
// that they are as they left them. It returns how many were not.
var _ = uffdtest.Handle("use", func(args []uint64) ([]uint64, error) {
	start, pages, seed, uses, zipf := args[0], args[1], args[2], args[3], args[4] != 0
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
func TestNothingIsLost(t *testing.T) {
	uses := uint64(15_000)
	if testing.Short() {
		uses = 2000
	}
	for _, c := range []struct {
		pages, limit int
		zipf         uint64
	}{
		{64, 16, 0},
		{1000, 250, 0},
		{1000, 250, 1},
		{3000, 100, 1},
	} {
		t.Run(fmt.Sprintf("%d of %d pages, zipf %d", c.limit, c.pages, c.zipf), func(t *testing.T) {
			s := start(t, c.pages, c.limit, nil)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			call := s.p.Run("use", uint64(s.mem.Start), uint64(c.pages), seed, uses, c.zipf)
			most := 0
			for !call.Done() {
				most = max(most, s.held(t))
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
		})
	}
}

// TestSystemCalls has the kernel read and write pages that are not there.
func TestSystemCalls(t *testing.T) {
	uffdtest.RequireAllFaults(t)
	s := start(t, 64, 16, nil)
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
func TestDiscarded(t *testing.T) {
	s := start(t, 64, 16, nil)
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
}

// TestBackingFails makes the backing file fail: the process gets a signal, and
// never wrong bytes.
func TestBackingFails(t *testing.T) {
	uffdtest.Require(t, Features|uffd.FeaturePoison)
	p := uffdtest.Start(t)
	mem, file := mapShared(t, p, 64)
	backing := backingFile(t)
	var failures atomic.Int32
	r, err := New(p.Open(&uffd.Config{Require: Features}), p.Pid, Config{
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
