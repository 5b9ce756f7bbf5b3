package uffd_test

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// TestUnregisterWakes has Unregister wake the threads that wait for missing pages.
func TestUnregisterWakes(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	load := p.Load(mem.Start)
	nextFault(t, f, mem.Page(0), 0)
	if err := f.Unregister(mem.Range); err != nil {
		t.Fatal(err)
	}
	if b := load.Value(); b != 0 {
		t.Errorf("loaded %d, want 0", b)
	}
}

// TestUnregisterDuringFaults has threads fault while their memory is
// unregistered. Without a wake afterwards the kernel forgets some of them.
func TestUnregisterDuringFaults(t *testing.T) {
	eachKind(t, uffdtest.Kinds, 4, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(nil)
		discard := unix.MADV_DONTNEED
		if mem.Kind.Shared() {
			discard = unix.MADV_REMOVE
		}
		rounds := 2000
		if testing.Short() { // one takes up to 240 ms on an emulated arm with Linux 7.3
			rounds = 100
		}
		if mem.Kind.Huge() {
			uffdtest.RequireKernel(t, 5, 18, "MADV_DONTNEED of hugetlb memory")
			rounds = min(rounds, 500) // each zeroes four huge pages
		}
		for range rounds {
			register(t, f, mem.Range, uffd.RegisterMissing)
			loads := p.Run("load-all-at-once", uint64(mem.Start), mem.Len, uint64(mem.Kind.PageSize()), uint64(discard))
			for range rand.IntN(300) { // some 100 us, for the threads to get there
				unix.Getppid()
			}
			if err := f.Unregister(mem.Range); err != nil {
				t.Fatal(err)
			}
			if n := loads.Value(); n != 0 {
				t.Fatalf("%d pages do not read as zeros", n)
			}
		}
	})
}

// load-all-at-once discards memory and loads from all its pages, each in a
// thread of its own.
var _ = uffdtest.Handle("load-all-at-once", func(args []uint64) ([]uint64, error) {
	mem, size, advice := uffdtest.BytesAt(args[0], args[1]), int(args[2]), int(args[3])
	if err := unix.Madvise(mem, advice); err != nil {
		return nil, err
	}
	var wrong atomic.Uint64
	var all sync.WaitGroup
	for i := 0; i < len(mem); i += size {
		all.Go(func() { wrong.Add(uint64(loadByte(mem[i:]))) })
	}
	all.Wait()
	return []uint64{wrong.Load()}, nil
})

// loadByte is not instrumented: a race detector that looks at memory faults in
// code that cannot be preempted.
//
//go:norace
func loadByte(mem []byte) byte { return mem[0] }

// TestUnregisterWPWakes has Unregister wake writers too, which the kernel alone
// does not do.
func TestUnregisterWPWakes(t *testing.T) {
	uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	p.Fill(mem.Range, 1).Value()
	register(t, f, mem.Range, uffd.RegisterWP)
	protect(t, f, mem.Range, uffd.WriteProtectWP)
	store := p.Store(mem.Start, 1)
	nextFault(t, f, mem.Page(0), wpFault)
	if err := f.Unregister(mem.Range); err != nil {
		t.Fatal(err)
	}
	wantMarked(t, p, mem, "unregistered")
	store.Value()
	if n := waiting(t, f); n != 0 {
		t.Errorf("%d threads still wait", n)
	}
}
