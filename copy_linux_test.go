package uffd_test

import (
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// What a fault waits for does not allocate, nor do its failures: an allocation
// can wait for a collector that waits for the faulting thread.
func TestNoAllocations(t *testing.T) {
	p := uffdtest.Start(t)
	const rounds = 100
	mem := p.Map(uffdtest.Anon, rounds+1) // AllocsPerRun makes one round more
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	f.SetReadDeadline(time.Now().Add(uffdtest.Patience))
	msgs := make([]uffd.Msg, 4)
	src := page(mem.Kind, 9)
	touch := p.Touch(mem)
	serve := func() {
		n, err := f.ReadMsgs(msgs)
		if n != 1 || err != nil {
			t.Fatalf("ReadMsgs = %d, %v", n, err)
		}
		fault, ok := msgs[0].Pagefault()
		if !ok {
			t.Fatalf("%v", &msgs[0])
		}
		if _, err := f.Copy(fault.Addr, src, uffd.CopyDontWake); err != nil {
			t.Fatal(err)
		}
		page := uffd.Range{Start: fault.Addr, Len: uint64(pageSize)}
		if _, err := f.Copy(fault.Addr, src, 0); !errors.Is(err, unix.EEXIST) {
			t.Fatalf("second Copy: %v", err)
		}
		if err := f.Wake(page); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(rounds, serve); n != 0 {
		t.Errorf("serving a fault allocates %v times", n)
	}
	if sum := touch.Value(); sum != 9*(rounds+1) {
		t.Errorf("the bytes add up to %d", sum)
	}

	own := uffd.RangeOf(mmap(t, 2))
	first := uffd.Range{Start: own.Start, Len: uint64(pageSize)}
	g := open(t, nil)
	register(t, g, first, uffd.RegisterMissing)
	past := time.Now().Add(-time.Second)
	for name, call := range map[string]func() error{
		"EEXIST":       func() error { _, err := g.Copy(own.Start, src, 0); return err },
		"ENOENT":       func() error { _, err := g.ZeroPage(own, 0); return err },
		"EINVAL":       func() error { _, err := g.Copy(own.Start, src, uffd.CopyWP); return err },
		"unaligned":    func() error { _, err := g.Copy(own.Start+1, src, 0); return err },
		"not there":    func() error { _, err := g.Continue(own, 0); return err },
		"WriteProtect": func() error { return g.WriteProtect(own, uffd.WriteProtectWP) },
		"deadline":     func() error { g.SetReadDeadline(past); _, err := g.ReadMsgs(msgs); return err },
		"one message":  func() error { g.SetReadDeadline(past); _, err := g.ReadMsg(); return err },
		"Wake":         func() error { return g.Wake(uffd.Range{Start: own.Start}) },
	} {
		call() // for EEXIST to come
		var err error
		if n := testing.AllocsPerRun(20, func() { err = call() }); n != 0 {
			t.Errorf("%s: allocates %v times", name, n)
		}
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	g.Close()
	if n := testing.AllocsPerRun(20, func() { g.Copy(own.Start, src, 0); g.Wake(first); g.ReadMsgs(msgs) }); n != 0 {
		t.Errorf("calls after Close allocate %v times", n)
	}
}

// hammer runs the collector until the test is over.
func hammer(t *testing.T) {
	stop := make(chan struct{})
	var collector sync.WaitGroup
	collector.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	})
	t.Cleanup(func() { close(stop); collector.Wait() })
}

// The source lies on a stack that is full after one or other number of calls, and
// grows, and so moves, somewhere on the way into the kernel.
func TestCopyFromStack(t *testing.T) {
	f := open(t, nil)
	hammer(t)
	const goroutines = 1500
	mem := mmap(t, goroutines)
	r := uffd.RangeOf(mem)
	register(t, f, r, uffd.RegisterMissing)
	var wg sync.WaitGroup
	for i := range goroutines {
		wg.Go(func() { // a goroutine begins with a small stack
			var src [64 << 10]byte // the largest page size; it stays on the stack
			for j := range src {
				src[j] = byte(i + 1)
			}
			if err := copyAfter(f, r.Start+uffd.Addr(i*pageSize), src[:pageSize], i); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range goroutines {
		for j, b := range mem[i*pageSize:][:pageSize] {
			if b != byte(i+1) {
				t.Fatalf("page %d, byte %d is %d, want %d", i, j, b, byte(i+1))
			}
		}
	}
}

// copyAfter copies after some calls. They are not inlined: it is recursive.
func copyAfter(f *uffd.File, dst uffd.Addr, src []byte, calls int) error {
	if calls > 0 {
		return copyAfter(f, dst, src, calls-1)
	}
	_, err := f.Copy(dst, src, 0)
	return err
}

// Nothing but the call holds the source, which other goroutines are out for.
func TestCopyKeepsSource(t *testing.T) {
	f := open(t, nil)
	hammer(t)
	const size = 1 << 20
	mem := mmap(t, size/pageSize)
	r := uffd.RangeOf(mem)
	register(t, f, r, uffd.RegisterMissing)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				sink.Store(new(pattern(size, 0xee)))
			}
		}
	})
	rounds := 200
	if testing.Short() {
		rounds = 20
	}
	for range rounds {
		if _, err := f.Copy(r.Start, pattern(size, 7), 0); err != nil {
			t.Fatal(err)
		}
		for i, b := range mem {
			if b != 7 {
				t.Fatalf("byte %d is %#x", i, b)
			}
		}
		unix.Madvise(mem, unix.MADV_DONTNEED)
	}
	close(stop)
	wg.Wait()
}

var sink atomic.Pointer[[]byte]

func pattern(n int, b byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = b
	}
	return p
}

// A fork event stays queued while the process has no descriptor for it, and is
// read once. Whoever reads it owns the descriptor.
func TestForkDescriptor(t *testing.T) {
	uffdtest.RequireRoot(t)
	uffdtest.Require(t, uffd.FeatureEventFork)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(&uffd.Config{Require: uffd.FeatureEventFork})
	register(t, f, mem.Range, uffd.RegisterMissing)
	before := countFDs(t)
	fork := p.Fork(uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{uint64(mem.Start)}})
	waitReadable(t, f)

	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	_, err := f.ReadMsg()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Fatalf("without a free descriptor: %v, want EMFILE", err)
	}

	m := next(t, f)
	child, err := f.Child(&m)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Child(&m); !errors.Is(err, unix.EINVAL) {
		t.Errorf("adopting twice: %v", err)
	}
	if fd, ok := m.Fork(); ok {
		t.Errorf("an adopted message still has descriptor %d", fd)
	}
	if only, known := child.UserModeOnly(); only || known { // f was adopted
		t.Errorf("the child's UserModeOnly: %v, %v", only, known)
	}
	if got := child.Features(); got != uffd.FeatureEventFork {
		t.Errorf("the child's features: %v", got)
	}
	if _, _, err := child.API(0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("API of the child: %v", err)
	}
	nextFault(t, child, mem.Page(0), 0)
	if _, err := child.Copy(mem.Start, page(mem.Kind, 8), 0); err != nil {
		t.Fatal(err)
	}
	values, err := fork.Result()
	if err != nil || values[1] != 8 {
		t.Errorf("the child read %v, %v", values, err)
	}
	// It is gone now, and says so.
	if _, err := child.Copy(mem.Page(1).Start, page(mem.Kind, 8), 0); !errors.Is(err, uffd.ErrGone) {
		t.Errorf("Copy to an exited process: %v", err)
	}
	if err := child.Close(); err != nil {
		t.Error(err)
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors before the fork, %d after", before, after)
	}
}
