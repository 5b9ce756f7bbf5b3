package track

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// eachSnapshotMemory runs a test for each kind of memory: n pages of another
// process.
func eachSnapshotMemory(t *testing.T, n int, test func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory)) {
	uffdtest.Require(t, SnapshotFeatures)
	for _, kind := range uffdtest.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			pages := n
			if kind.Huge() {
				pages = 6
				uffdtest.LockSettings(t).HugePages(2 * pages) // private ones may be copied
			}
			p := uffdtest.Start(t)
			mem := p.Map(kind, pages)
			p.Madvise(mem.Range, unix.MADV_DONTFORK).Value() // else it needs privilege
			test(t, p, mem)
		})
	}
	t.Run("thp", func(t *testing.T) {
		p := uffdtest.Start(t)
		test(t, p, mapTHP(t, p))
	})
}

// mapTHP maps two transparent huge pages, of which one exists.
func mapTHP(t *testing.T, p *uffdtest.Process) uffdtest.Memory {
	huge := uffdtest.RequireTHP(t)
	mem := p.Map(uffdtest.Anon, int(3*huge)/os.Getpagesize())
	mem.Start, mem.Len = (mem.Start+uffd.Addr(huge-1))&^uffd.Addr(huge-1), 2*huge
	p.Madvise(mem.Range, unix.MADV_HUGEPAGE).Value()
	p.Store(mem.Start, 1).Value()
	if n := p.Smaps(mem.Start, "AnonHugePages"); n == 0 {
		t.Fatal("the memory is not of huge pages")
	}
	return mem
}

func openSnapshot(p *uffdtest.Process) *uffd.File {
	return p.Open(&uffd.Config{Require: SnapshotFeatures})
}

func startSnapshotOf(t *testing.T, p *uffdtest.Process, config *SnapshotConfig, ranges ...uffd.Range) *Snapshot {
	t.Helper()
	s, err := StartSnapshot(openSnapshot(p), p.Pid, config, ranges...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Stop() })
	return s
}

// readAll reads a process's memory.
func readAll(t *testing.T, p *uffdtest.Process, r uffd.Range) []byte {
	t.Helper()
	b := make([]byte, r.Len)
	if err := readMemory(p.Pid, b, r.Start); err != nil {
		t.Fatal(err)
	}
	return b
}

// A writerFunc is an io.Writer.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// "write-until" has several threads write until a byte elsewhere is set: in one
// order to the first word of pages, or each in its own to a word of its own.
var _ = uffdtest.Handle("write-until", func(args []uint64) ([]uint64, error) {
	start, page, n, seed, stop, oneOrder := args[0], args[1], args[2], args[3], args[4], args[5] != 0
	var all sync.WaitGroup
	var turn sync.Mutex
	shared := rand.New(rand.NewPCG(seed, 0))
	last := uint64(0)
	for w := range uint64(writers) {
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, w))
			for i := uint64(1); uffdtest.BytesAt(stop, 1)[0] == 0; i++ {
				if !oneOrder {
					storeWord(start+random.Uint64N(n)*page+8*w, i)
					continue
				}
				turn.Lock()
				last++
				storeWord(start+shared.Uint64N(n)*page, last)
				turn.Unlock()
			}
		})
	}
	all.Wait()
	return nil, nil
})

// storeWord writes a word at once. The race detector would have it written byte by
// byte, and a snapshot could be taken in between.
//
//go:norace
func storeWord(a, v uint64) { *(*uint64)(unsafe.Pointer(unsafe.SliceData(uffdtest.BytesAt(a, 8)))) = v }

// replay returns the words of n pages after the first k writes of a thread.
func replay(seed, thread, n, k uint64) []uint64 {
	words := make([]uint64, n)
	random := rand.New(rand.NewPCG(seed, thread))
	for i := range k {
		words[random.Uint64N(n)] = i + 1
	}
	return words
}

// checkMoment reports words that do not belong to one moment: what thread has
// written up to its last write is there, and no more.
func checkMoment(t *testing.T, image []byte, page, n, seed, thread uint64) (last uint64) {
	t.Helper()
	got := make([]uint64, n)
	for i := range got {
		got[i] = binary.NativeEndian.Uint64(image[uint64(i)*page+8*thread:])
		last = max(last, got[i])
	}
	for i, want := range replay(seed, thread, n, last) {
		if got[i] != want {
			t.Fatalf("page %d has write %d of thread %d, page at the same moment (write %d) had %d", i, got[i], thread, last, want)
		}
	}
	return last
}

// TestSnapshotMoment takes snapshots while several threads write.
func TestSnapshotMoment(t *testing.T) {
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	eachSnapshotMemory(t, 600, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		page, n, seed := uint64(mem.Kind.PageSize()), uint64(mem.Pages()), newSeed(t)
		control := p.Map(uffdtest.Anon, 1)
		for round := range rounds {
			seed++
			threads, oneOrder := uint64(writers), uint64(0)
			if round%2 == 1 {
				threads, oneOrder = 1, 1
			}
			p.Fill(mem.Range, 0).Value()
			if round < 2 && mem.Kind == uffdtest.Anon {
				p.Madvise(mem.Range, unix.MADV_DONTNEED).Value() // pages do not exist
			}
			p.Store(control.Start, 0).Value()
			call := p.Run("write-until", uint64(mem.Start), page, n, seed, uint64(control.Start), oneOrder)
			for first := make([]byte, 8); bytes.Equal(first, make([]byte, 8)); { // until it writes
				if err := readMemory(p.Pid, first, mem.Start); err != nil {
					t.Fatal(err)
				}
			}
			var config *SnapshotConfig
			if round >= rounds/2 {
				config = &SnapshotConfig{Ahead: int(4 * page)}
			}
			s := startSnapshotOf(t, p, config, mem.Range)
			var image bytes.Buffer
			size, err := s.WriteTo(writerFunc(func(p []byte) (int, error) {
				time.Sleep(time.Duration(round) * 100 * time.Microsecond)
				return image.Write(p)
			}))
			if err != nil || size != int64(mem.Len) || uint64(image.Len()) != mem.Len {
				t.Fatalf("WriteTo = %d, %v; wrote %d of %d bytes", size, err, image.Len(), mem.Len)
			}
			if err := s.Stop(); err != nil {
				t.Errorf("Stop: %v", err)
			}
			p.Store(control.Start, 1).Value()
			call.Value()
			end := readAll(t, p, mem.Range)
			var at, last []uint64
			for thread := range threads {
				at = append(at, checkMoment(t, image.Bytes(), page, n, seed, thread))
				last = append(last, checkMoment(t, end, page, n, seed, thread))
			}
			t.Logf("round %d, seed %d: of %v, ended at %v, %+v", round, seed, at, last, s.Stats())
			if stats := s.Stats(); stats.Size != mem.Len || config != nil && stats.AheadMax > uint64(config.Ahead) {
				t.Errorf("%+v", stats)
			}
		}
	})
}

// TestSnapshot writes to all pages between the start and WriteTo.
func TestSnapshot(t *testing.T) {
	eachSnapshotMemory(t, 200, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		half := uffd.Range{Start: mem.Start, Len: mem.Len / 2}
		p.Fill(half, 1).Value() // others do not exist
		other := p.Map(uffdtest.Anon, 3)
		p.Fill(other.Range, 3).Value()
		s := startSnapshotOf(t, p, nil, mem.Range, other.Range)
		p.Fill(mem.Range, 2).Value()
		// A thread goes on before what it waited for is counted.
		for end := time.Now().Add(uffdtest.Patience); s.Stats().Stalls < uint64(mem.Pages()) && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if stats := s.Stats(); stats.Stalls != uint64(mem.Pages()) || stats.AheadMax != mem.Len || stats.StallMax == 0 {
			t.Errorf("after writes to %d pages: %+v", mem.Pages(), stats)
		}
		var image bytes.Buffer
		if n, err := s.WriteTo(&image); n != int64(mem.Len+other.Len) || err != nil {
			t.Fatalf("WriteTo = %d, %v", n, err)
		}
		want := append(bytes.Repeat([]byte{1}, int(mem.Len/2)), make([]byte, mem.Len/2)...)
		threes := bytes.Repeat([]byte{3}, int(other.Len))
		if other.Start < mem.Start {
			want = append(threes, want...)
		} else {
			want = append(want, threes...)
		}
		if !bytes.Equal(image.Bytes(), want) {
			t.Error("the snapshot is not what was there")
		}
		if flags := p.VMFlags(mem.Start); strings.Contains(flags, "uw") {
			t.Errorf("still registered: %s", flags)
		}
		if bad := p.Check(mem.Range, 2).Value(); bad != 0 {
			t.Errorf("%d bytes of the process differ", bad)
		}
		if _, err := s.WriteTo(&image); !errors.Is(err, unix.EINVAL) {
			t.Errorf("second WriteTo: %v", err)
		}
	})
}

// TestSnapshotLost does what a snapshot cannot follow: before WriteTo, and after
// it had its page.
func TestSnapshotLost(t *testing.T) {
	uffdtest.Require(t, SnapshotFeatures)
	const n = 512 // several chunks
	type doer func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory, page uffd.Range)
	remap := func(_ *testing.T, p *uffdtest.Process, mem uffdtest.Memory, page uffd.Range) {
		p.Mremap(page, page.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, p.Mmap(0, page.Len, readWrite, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, -1)).Value()
	}
	madvise := func(advice int) doer {
		return func(_ *testing.T, p *uffdtest.Process, _ uffdtest.Memory, page uffd.Range) {
			p.Madvise(page, advice).Value()
		}
	}
	for _, c := range []struct {
		name string
		kind uffdtest.Kind
		do   doer
		says string
	}{
		{"DONTNEED", uffdtest.Anon, madvise(unix.MADV_DONTNEED), "discarded"},
		{"FREE", uffdtest.Anon, madvise(unix.MADV_FREE), "discarded"},
		{"REMOVE", uffdtest.Shmem, madvise(unix.MADV_REMOVE), "discarded"},
		{"munmap", uffdtest.Anon, func(_ *testing.T, p *uffdtest.Process, _ uffdtest.Memory, page uffd.Range) { p.Munmap(page).Value() }, "unmapped"},
		{"mmap", uffdtest.Shmem, func(_ *testing.T, p *uffdtest.Process, _ uffdtest.Memory, page uffd.Range) {
			p.Mmap(page.Start, page.Len, readWrite, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED, -1)
		}, "unmapped"},
		{"mremap", uffdtest.Anon, remap, "moved"},
		{"guard", uffdtest.Anon, func(t *testing.T, p *uffdtest.Process, _ uffdtest.Memory, page uffd.Range) {
			const install, remove = 102, 103
			if _, err := p.Madvise(page, install).Result(); err != nil {
				uffdtest.RequireKernel(t, 6, 13, "MADV_GUARD_INSTALL")
				t.Fatal(err)
			}
			p.Madvise(page, remove).Value()
		}, "protection"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := uffdtest.Start(t)
			mem := p.Map(c.kind, n)
			p.Madvise(mem.Range, unix.MADV_DONTFORK).Value()
			if c.kind == uffdtest.Anon {
				p.Madvise(mem.Range, unix.MADV_NOHUGEPAGE).Value()
			}
			p.Fill(mem.Range, 7).Value()
			want := bytes.Repeat([]byte{7}, int(mem.Len))

			s := startSnapshotOf(t, p, nil, mem.Range)
			var image bytes.Buffer
			done := false
			_, err := s.WriteTo(writerFunc(func(b []byte) (int, error) {
				if !done {
					done = true
					c.do(t, p, mem, mem.Page(0))
				}
				return image.Write(b)
			}))
			if err != nil || !bytes.Equal(image.Bytes(), want) {
				t.Fatalf("after its page was copied: %v", err)
			}
			s.Stop()

			rest := uffd.Range{Start: mem.Page(1).Start, Len: mem.Len - mem.Page(0).Len}
			s = startSnapshotOf(t, p, nil, rest)
			c.do(t, p, mem, mem.Page(n-3))
			k, err := s.WriteTo(&image)
			if !errors.Is(err, ErrSnapshotLost) || !strings.Contains(err.Error(), c.says) || uint64(k) >= rest.Len {
				t.Errorf("WriteTo = %d, %v; want ErrSnapshotLost that says %q", k, err, c.says)
			}
			p.Fill(mem.Page(n-1), 8).Value() // the process goes on
			p.Madvise(mem.Page(n-1), unix.MADV_DONTNEED).Value()
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A round of TestSnapshotChanges: what becomes of a page while it is copied.
var _ = uffdtest.Handle("disturb", func(args []uint64) ([]uint64, error) {
	start, page, n, seed := args[0], args[1], args[2], args[3]
	random := rand.New(rand.NewPCG(seed, 2))
	at := func() []byte { return uffdtest.BytesAt(start+random.Uint64N(n)*page, page) }
	for range random.IntN(4) {
		spin := 0
		for range random.IntN(100_000) { // to come at any time
			spin++
		}
		b := at()
		var err error
		kind := random.IntN(6)
		if seed%2 == 0 {
			kind = 2 // which only the events tell
		}
		switch kind {
		case 0:
			err = unix.Madvise(b, unix.MADV_DONTNEED)
		case 1:
			_, err = unix.MmapPtr(-1, 0, unsafe.Pointer(unsafe.SliceData(b)), uintptr(page), readWrite,
				unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
		case 2: // other protected memory
			to, from := uffd.RangeOf(b), uffd.RangeOf(at())
			if to == from {
				continue
			}
			_, _, e := unix.Syscall6(unix.SYS_MREMAP, uintptr(from.Start), uintptr(page), uintptr(page),
				unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uintptr(to.Start), 0)
			if e != 0 && e != unix.EFAULT { // from is gone
				err = e
			}
		case 3:
			unix.Madvise(b, 102)
			unix.Madvise(b, 103)
		case 4:
			err = unix.Madvise(b, unix.MADV_FREE)
		case 5:
			unix.Mprotect(b, unix.PROT_READ)
		}
		if err != nil && err != unix.ENOMEM { // part of it is gone
			return nil, err
		}
	}
	return nil, nil
})

// TestSnapshotChanges changes mappings at random times: a snapshot is right, or
// lost.
func TestSnapshotChanges(t *testing.T) {
	uffdtest.Require(t, SnapshotFeatures)
	rounds := 150
	if testing.Short() {
		rounds = 30
	}
	p := uffdtest.Start(t)
	const n = 300
	page, seed := uint64(os.Getpagesize()), newSeed(t)
	results := make(map[string]int)
	for range rounds {
		seed++
		mem := p.Map(uffdtest.Anon, n)
		p.Run("write", uint64(mem.Start), page, n, seed, 10*n).Value()
		want := readAll(t, p, mem.Range)
		s, err := StartSnapshot(openSnapshot(p), p.Pid, nil, mem.Range)
		if err != nil {
			t.Fatal(err)
		}
		call := p.Run("disturb", uint64(mem.Start), page, n, seed)
		var image bytes.Buffer
		_, err = s.WriteTo(&image)
		switch {
		case err == nil && !bytes.Equal(image.Bytes(), want):
			t.Fatalf("seed %d: the snapshot is wrong, without an error", seed)
		case err == nil:
			results["right"]++
		case errors.Is(err, ErrSnapshotLost), errors.Is(err, unix.EFAULT), errors.Is(err, unix.ENOENT):
			results["lost"]++
		default:
			t.Fatalf("seed %d: %v", seed, err)
		}
		call.Value()
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		p.Munmap(mem.Range).Value()
	}
	t.Log(results)
	if results["right"] == 0 || results["lost"] == 0 {
		t.Errorf("%v of %d", results, rounds)
	}
}

// awaitMessage waits until a message can be read.
func awaitMessage(t *testing.T, f *uffd.File) {
	t.Helper()
	for end := time.Now().Add(uffdtest.Patience); !readable(f); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no message comes")
		}
	}
}

// TestSnapshotRetry has the kernel refuse to lift the protection, because an
// event waits to be read. What was copied meanwhile does not count.
func TestSnapshotRetry(t *testing.T) {
	uffdtest.Require(t, SnapshotFeatures)
	// start returns two mappings in the order of their addresses, and a third one
	// that is registered, too: what happens to it is an event and no matter.
	start := func(t *testing.T) (p *uffdtest.Process, first, second, extra uffdtest.Memory, s *Snapshot) {
		p = uffdtest.Start(t)
		first, second, extra = p.Map(uffdtest.Anon, 4), p.Map(uffdtest.Anon, 4), p.Map(uffdtest.Anon, 1)
		if second.Start < first.Start {
			first, second = second, first
		}
		for _, mem := range []uffdtest.Memory{first, second, extra} {
			p.Madvise(mem.Range, unix.MADV_NOHUGEPAGE).Value()
		}
		p.Fill(first.Range, 1).Value()
		p.Fill(second.Range, 2).Value()
		p.Fill(extra.Range, 3).Value()
		f := openSnapshot(p)
		if _, err := f.Register(extra.Range, uffd.RegisterWP); err != nil {
			t.Fatal(err)
		}
		discarding := p.Madvise(extra.Range, unix.MADV_DONTNEED)
		awaitMessage(t, f)
		s, err := armedSnapshot(f, p.Pid, nil, []uffd.Range{first.Range, second.Range})
		if err != nil {
			t.Fatalf("starting while an event waits: %v", err)
		}
		discarding.Value()
		return p, first, second, extra, s
	}

	t.Run("sweep", func(t *testing.T) {
		p, first, second, _, s := start(t)
		left := s.copier.left
		moving := p.Mremap(second.Page(1), second.Page(1).Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, first.Page(2).Start)
		awaitMessage(t, s.file)
		s.free <- make([]byte, snapshotChunk)
		if err := s.sweep(); !errors.Is(err, uffd.ErrRetry) || len(s.full) != 0 || s.copier.left != left {
			t.Fatalf("sweep: %v; %d chunks, %d of %d bytes left; want ErrRetry and nothing done", err, len(s.full), s.copier.left, left)
		}
		<-s.free // WriteTo gives its own
		go s.run()
		moving.Value()
		if _, err := s.WriteTo(&bytes.Buffer{}); !errors.Is(err, ErrSnapshotLost) {
			t.Errorf("WriteTo: %v, want ErrSnapshotLost", err)
		}
		s.Stop()
	})

	t.Run("fault", func(t *testing.T) {
		p, first, second, extra, s := start(t)
		c := &s.copier
		wait := func(page uffd.Range) *uffdtest.Call {
			t.Helper()
			call := p.Store(page.Start, 9)
			awaitMessage(t, s.file)
			if err := s.receive(time.Now().Add(uffdtest.Patience)); err != nil || len(c.waiting) != 1 {
				t.Fatalf("receive: %v, %d threads wait", err, len(c.waiting))
			}
			return call
		}
		retry := func(waiting int, used uint64) {
			t.Helper()
			if err := s.retry(); err != nil || len(c.waiting) != waiting || c.used != used || uint64(len(c.ahead)) != used/pageSize() {
				t.Fatalf("retry: %v; %d threads wait, %d bytes kept; want %d, %d", err, len(c.waiting), c.used, waiting, used)
			}
		}
		meanwhile := func(check func()) {
			t.Helper()
			discarding := p.Madvise(extra.Range, unix.MADV_DONTNEED)
			awaitMessage(t, s.file)
			check()
			if err := s.receive(time.Now().Add(uffdtest.Patience)); err != nil {
				t.Fatal(err)
			}
			discarding.Value()
		}

		storing := wait(first.Page(1)) // it is not copied
		meanwhile(func() { retry(1, 0) })
		retry(0, pageSize())
		storing.Value()

		storing = wait(second.Page(3)) // it is copied before the writer is looked after
		s.free <- make([]byte, snapshotChunk)
		if err := s.sweep(); err != nil || c.left != 0 {
			t.Fatalf("sweep: %v, %d bytes left", err, c.left)
		}
		meanwhile(func() { retry(1, 0) })
		retry(0, 0)
		storing.Value()

		go s.run()
		image := <-s.full
		want := append(bytes.Repeat([]byte{1}, int(first.Len)), bytes.Repeat([]byte{2}, int(second.Len))...)
		if !bytes.Equal(image, want) {
			t.Error("the snapshot is not what was there")
		}
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestSnapshotFork(t *testing.T) {
	uffdtest.Require(t, SnapshotFeatures)
	for _, c := range []struct {
		kind  uffdtest.Kind
		event bool
		lost  bool
	}{
		{uffdtest.Anon, false, false},
		{uffdtest.Anon, true, false},
		{uffdtest.ShmemPrivate, true, false},
		{uffdtest.Shmem, true, true},
	} {
		t.Run(fmt.Sprintf("%v/event=%v", c.kind, c.event), func(t *testing.T) {
			config := uffd.Config{Require: SnapshotFeatures}
			if c.event {
				uffdtest.RequireEventFork(t)
				config.Require |= uffd.FeatureEventFork
			}
			p := uffdtest.Start(t)
			mem := p.Map(c.kind, 100)
			p.Fill(mem.Range, 5).Value()
			s, err := StartSnapshot(p.Open(&config), p.Pid, nil, mem.Range)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Stop()
			write := func(i int) uffdtest.Step {
				return uffdtest.Step{Op: uffdtest.StepStore, Args: [6]uint64{uint64(mem.Page(i).Start), 6}}
			}
			if _, err := p.Fork(write(0), write(50)).Result(); err != nil {
				t.Fatal(err)
			}
			p.Fill(mem.Page(1), 7).Value()
			p.Fill(mem.Page(99), 7).Value()
			var image bytes.Buffer
			_, err = s.WriteTo(&image)
			if c.lost {
				if !errors.Is(err, ErrSnapshotLost) || !strings.Contains(err.Error(), "forked") {
					t.Errorf("WriteTo: %v, want ErrSnapshotLost", err)
				}
			} else if err != nil || !bytes.Equal(image.Bytes(), bytes.Repeat([]byte{5}, int(mem.Len))) {
				t.Errorf("WriteTo: %v, or the snapshot is wrong", err)
			}
		})
	}
}

// TestSnapshotHangup ends snapshots early.
func TestSnapshotHangup(t *testing.T) {
	uffdtest.Require(t, SnapshotFeatures)
	started := func(t *testing.T) (*uffdtest.Process, uffdtest.Memory, *Snapshot) {
		p := uffdtest.Start(t)
		mem := p.Map(uffdtest.Anon, 1000)
		p.Fill(mem.Range, 1).Value()
		return p, mem, startSnapshotOf(t, p, &SnapshotConfig{Ahead: 2 * os.Getpagesize()}, mem.Range)
	}
	t.Run("process killed", func(t *testing.T) {
		p, _, s := started(t)
		p.Kill()
		if _, err := s.WriteTo(&bytes.Buffer{}); !errors.Is(err, uffd.ErrGone) {
			t.Errorf("WriteTo: %v, want ErrGone", err)
		}
	})
	t.Run("writer fails", func(t *testing.T) {
		p, mem, s := started(t)
		call := p.Fill(mem.Range, 2) // waits: there is no room
		n, err := s.WriteTo(writerFunc(func(p []byte) (int, error) { return 3, unix.ENOSPC }))
		if n != 3 || err != unix.ENOSPC {
			t.Errorf("WriteTo = %d, %v", n, err)
		}
		call.Value() // goes on
	})
	t.Run("stopped", func(t *testing.T) {
		p, mem, s := started(t)
		call := p.Fill(mem.Range, 2)
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		call.Value()
		if _, err := s.WriteTo(&bytes.Buffer{}); !errors.Is(err, os.ErrClosed) {
			t.Errorf("WriteTo after Stop: %v", err)
		}
	})
	t.Run("stopped while writing", func(t *testing.T) {
		p, mem, s := started(t)
		call := p.Fill(mem.Range, 2)
		var stopping sync.WaitGroup
		_, err := s.WriteTo(writerFunc(func(p []byte) (int, error) {
			stopping.Go(func() { s.Stop() })
			return len(p), nil
		}))
		if err != nil && !errors.Is(err, os.ErrClosed) {
			t.Errorf("WriteTo: %v", err)
		}
		stopping.Wait()
		call.Value()
	})
}

func TestSnapshotErrors(t *testing.T) {
	uffdtest.Require(t, SnapshotFeatures)
	p := uffdtest.Start(t)
	mem, shared := p.Map(uffdtest.Anon, 8), p.Map(uffdtest.Shmem, 4)
	p.Fill(mem.Range, 1).Value()
	own, err := uffd.New(&uffd.Config{Require: SnapshotFeatures})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	mine := anonymous(t, 4)
	mine.write(0, 4)
	good := openSnapshot(p)
	half := uffd.Range{Start: uffd.Addr(os.Getpagesize()), Len: uint64(os.Getpagesize())}
	for _, c := range []struct {
		name   string
		f      *uffd.File
		pid    int
		config *SnapshotConfig
		r      []uffd.Range
		err    error
		says   string
	}{
		{"own", own, 0, nil, []uffd.Range{mine.r()}, errors.ErrUnsupported, "its own faults"},
		{"own by pid", own, os.Getpid(), nil, []uffd.Range{mine.r()}, errors.ErrUnsupported, "its own faults"},
		{"features", openIn(p, Sync), p.Pid, nil, []uffd.Range{mem.Range}, unix.EINVAL, "EVENT_REMAP"},
		{"async", p.Open(&uffd.Config{Require: SnapshotFeatures, Prefer: uffd.FeatureWPAsync | uffd.FeatureSigbus}), p.Pid, nil, []uffd.Range{mem.Range}, unix.EINVAL, "SIGBUS"},
		{"ahead", good, p.Pid, &SnapshotConfig{Ahead: -1}, []uffd.Range{mem.Range}, unix.EINVAL, "Ahead"},
		{"part of a page", good, p.Pid, nil, []uffd.Range{{Start: mem.Start, Len: 5}}, unix.EINVAL, "whole pages"},
		{"nothing mapped", good, p.Pid, nil, []uffd.Range{half}, unix.EINVAL, "nothing is mapped"},
		{"nothing", good, p.Pid, nil, nil, unix.EINVAL, "no memory"},
		{"shared", good, p.Pid, nil, []uffd.Range{shared.Range}, unix.EINVAL, "MADV_DONTFORK"},
		{"no process", good, 1 << 30, nil, []uffd.Range{mem.Range}, os.ErrNotExist, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := StartSnapshot(c.f, c.pid, c.config, c.r...)
			if s != nil || !errors.Is(err, c.err) || !strings.Contains(fmt.Sprint(err), c.says) {
				t.Fatalf("StartSnapshot = %v, %v; want %v that says %q", s != nil, err, c.err, c.says)
			}
		})
	}
	t.Run("hole", func(t *testing.T) {
		p.Munmap(mem.Page(4)).Value()
		if _, err := StartSnapshot(good, p.Pid, nil, mem.Range); !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EEXIST) {
			t.Errorf("StartSnapshot: %v, want EINVAL", err)
		}
	})
	t.Run("of another process", func(t *testing.T) {
		// The same address exists in both: a fixed one.
		q := uffdtest.Start(t)
		at := uffd.Addr(0x10000000)
		for _, x := range []*uffdtest.Process{p, q} {
			x.Mmap(at, 4*uint64(os.Getpagesize()), readWrite, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED, -1)
		}
		r := uffd.Range{Start: at, Len: 4 * uint64(os.Getpagesize())}
		f := openSnapshot(q)
		if _, err := StartSnapshot(f, p.Pid, nil, r); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "another process") {
			t.Errorf("StartSnapshot: %v, want EINVAL", err)
		}
		q.Fill(r, 1).Value() // and q goes on
	})
	t.Run("after failures", func(t *testing.T) {
		s, err := StartSnapshot(good, p.Pid, nil, mem.Page(0))
		if err != nil {
			t.Fatal(err)
		}
		var image bytes.Buffer
		if _, err := s.WriteTo(&image); err != nil || image.Len() != os.Getpagesize() {
			t.Errorf("WriteTo: %v", err)
		}
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
}
