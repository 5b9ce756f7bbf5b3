package uffd_test

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

const bothRWP = uffd.FeatureRWP | uffd.FeatureRWPAsync

// eachRWP runs test on memory that is populated, with page i full of 1+i,
// registered and protected from every access.
func eachRWP(t *testing.T, features uffd.Features, test func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory)) {
	uffdtest.Require(t, features)
	eachKind(t, uffdtest.Kinds, 4, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(&uffd.Config{Require: features})
		for i := range mem.Pages() {
			p.Fill(mem.Page(i), byte(1+i)).Value()
		}
		if ioctls := register(t, f, mem.Range, uffd.RegisterRWP); !ioctls.Has(uffd.IoctlRWProtect) {
			t.Errorf("ioctls %v", ioctls)
		}
		if err := f.RWProtect(mem.Range, uffd.RWProtectRWP); err != nil {
			t.Fatal(err)
		}
		wantMarked(t, p, mem, "protected", 0, 1, 2, 3)
		test(t, p, f, mem)
	})
}

// wantPages reads the pages that eachRWP filled.
func wantPages(t testing.TB, p *uffdtest.Process, mem uffdtest.Memory) {
	t.Helper()
	for i := range mem.Pages() {
		if bad := p.Check(mem.Page(i), byte(1+i)).Value(); bad != 0 {
			t.Errorf("page %d: %d bytes differ", i, bad)
		}
	}
}

func TestRWPAsync(t *testing.T) {
	eachRWP(t, bothRWP, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		wantPages(t, p, mem)
		wantMarked(t, p, mem, "accessed")
		quiet(t, f)
	})
}

func TestRWPSync(t *testing.T) {
	eachRWP(t, uffd.FeatureRWP, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		load := p.Load(mem.Page(1).Start)
		nextFault(t, f, mem.Page(1), uffd.PagefaultRWP)
		if err := f.RWProtect(mem.Page(1), uffd.RWProtectDontWake); err != nil {
			t.Fatal(err)
		}
		if n := waiting(t, f); n != 1 {
			t.Errorf("%d threads wait after DontWake, want 1", n)
		}
		if err := f.Wake(mem.Page(1)); err != nil {
			t.Fatal(err)
		}
		if b := load.Value(); b != 2 {
			t.Errorf("loaded %d, want 2", b)
		}
		store := p.Store(mem.Page(2).Start, 3)
		nextFault(t, f, mem.Page(2), uffd.PagefaultRWP|uffd.PagefaultWrite)
		if err := f.RWProtect(mem.Range, 0); err != nil {
			t.Fatal(err)
		}
		store.Value()
		wantPages(t, p, mem)
		quiet(t, f)
		both := uffd.RWProtectRWP | uffd.RWProtectDontWake
		if err := f.RWProtect(mem.Range, both); !errors.Is(err, unix.EINVAL) {
			t.Errorf("RWProtect(%v): %v", both, err)
		}
	})
}

// TestRWPUnregister has Unregister wake the threads, which the kernel does not do.
func TestRWPUnregister(t *testing.T) {
	eachRWP(t, uffd.FeatureRWP, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		load := p.Load(mem.Page(0).Start)
		nextFault(t, f, mem.Page(0), uffd.PagefaultRWP)
		if err := f.Unregister(mem.Range); err != nil {
			t.Fatal(err)
		}
		wantMarked(t, p, mem, "unregistered")
		load.Value()
		wantPages(t, p, mem)
		if err := f.RWProtect(mem.Range, uffd.RWProtectRWP); !errors.Is(err, unix.ENOENT) {
			t.Errorf("RWProtect of memory that is not registered: %v", err)
		}
	})
}

// The kernel's struct pm_scan_arg and struct page_region.
type (
	scanArg struct {
		size, flags, start, end, walkEnd, vec, vecLen, maxPages uint64
		inverted, mask, anyof, returned                         uint64
	}
	scanRegion struct{ start, end, _ uint64 }
)

var scanRegions [16]scanRegion // not on a stack, which moves

// accessed returns the ranges of r whose pages PAGEMAP_SCAN calls accessed.
func accessed(t testing.TB, p *uffdtest.Process, r uffd.Range) (list []uffd.Range) {
	t.Helper()
	const (
		pagemapScan = 0xc0606610
		isAccessed  = 1 << 9
	)
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", p.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	arg := scanArg{
		size:     uint64(unsafe.Sizeof(scanArg{})),
		start:    uint64(r.Start),
		end:      uint64(r.End()),
		vec:      uint64(uintptr(unsafe.Pointer(&scanRegions))),
		vecLen:   uint64(len(scanRegions)),
		mask:     isAccessed,
		returned: isAccessed,
	}
	n, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), pagemapScan, uintptr(unsafe.Pointer(&arg)))
	if e != 0 {
		t.Fatalf("PAGEMAP_SCAN: %v", e)
	}
	for _, found := range scanRegions[:n] {
		list = append(list, uffd.Range{Start: uffd.Addr(found.start), Len: found.end - found.start})
	}
	return list
}

func TestRWPPagemap(t *testing.T) {
	eachRWP(t, bothRWP, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		if list := accessed(t, p, mem.Range); len(list) != 0 {
			t.Errorf("accessed: %v, want nothing", list)
		}
		half := mem
		half.Len /= 2
		p.Touch(half).Value()
		if list := accessed(t, p, mem.Range); len(list) != 1 || list[0] != half.Range {
			t.Errorf("accessed: %v, want %v", list, half.Range)
		}
	})
}

func TestRWPMprotect(t *testing.T) {
	eachRWP(t, bothRWP, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		p.Mprotect(mem.Range, unix.PROT_NONE).Value()
		p.Mprotect(mem.Range, unix.PROT_READ|unix.PROT_WRITE).Value()
		wantMarked(t, p, mem, "after mprotect", 0, 1, 2, 3)
		wantPages(t, p, mem)
		wantMarked(t, p, mem, "accessed")
		if list := accessed(t, p, mem.Range); len(list) != 1 || list[0] != mem.Range {
			t.Errorf("accessed: %v, want %v", list, mem.Range)
		}
	})
}

// vmsplice sends a byte through a pipe by reference.
var _ = uffdtest.Handle("vmsplice", func(args []uint64) ([]uint64, error) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	iov := unix.Iovec{Base: &uffdtest.BytesAt(args[0], 1)[0]}
	iov.SetLen(1)
	if _, err := unix.Vmsplice(pipe[1], []unix.Iovec{iov}, 0); err != nil {
		return nil, err
	}
	var got [1]byte
	if _, err := unix.Read(pipe[0], got[:]); err != nil {
		return nil, err
	}
	return []uint64{uint64(got[0])}, nil
})

func TestRWPGUP(t *testing.T) {
	uffdtest.RequireAllFaults(t)
	eachRWP(t, bothRWP, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		if b := p.Run("vmsplice", uint64(mem.Page(2).Start)).Value(); b != 3 {
			t.Errorf("got %d through the pipe, want 3", b)
		}
		wantMarked(t, p, mem, "accessed by the kernel", 0, 1, 3)
	})
}

func TestRWPAsyncToggle(t *testing.T) {
	eachRWP(t, bothRWP, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		p.Load(mem.Page(0).Start).Value()
		quiet(t, f)
		if err := f.SetMode(0, uffd.FeatureRWPAsync); err != nil {
			t.Fatal(err)
		}
		if f.Features() != uffd.FeatureRWP {
			t.Errorf("Features = %v", f.Features())
		}
		p.Load(mem.Page(0).Start).Value() // not protected any more
		load := p.Load(mem.Page(1).Start)
		nextFault(t, f, mem.Page(1), uffd.PagefaultRWP)
		if err := f.SetMode(uffd.FeatureRWPAsync, 0); err != nil {
			t.Fatal(err)
		}
		if b := load.Value(); b != 2 { // it was woken, and the kernel resolves it now
			t.Errorf("loaded %d, want 2", b)
		}
		if f.Features() != bothRWP {
			t.Errorf("Features = %v", f.Features())
		}
		p.Load(mem.Page(2).Start).Value()
		quiet(t, f)
		for _, set := range [][2]uffd.Features{
			{uffd.FeatureRWPAsync, uffd.FeatureRWPAsync},
			{uffd.FeatureRWP, 0},
			{0, uffd.FeatureEventFork},
		} {
			if err := f.SetMode(set[0], set[1]); !errors.Is(err, unix.EINVAL) {
				t.Errorf("SetMode(%v, %v): %v", set[0], set[1], err)
			}
		}
	})
}

func TestRWPClose(t *testing.T) {
	eachRWP(t, uffd.FeatureRWP, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		load := p.Load(mem.Page(3).Start)
		nextFault(t, f, mem.Page(3), uffd.PagefaultRWP)
		p.Close().Value()
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if b := load.Value(); b != 4 {
			t.Errorf("loaded %d, want 4", b)
		}
		wantPages(t, p, mem)
	})
}

func TestRWPFork(t *testing.T) {
	uffdtest.RequireEventFork(t)
	eachRWP(t, uffd.FeatureRWP|uffd.FeatureEventFork, func(t *testing.T, p *uffdtest.Process, f *uffd.File, mem uffdtest.Memory) {
		forked := p.Fork(
			uffdtest.Step{Op: uffdtest.StepPagemap, Args: [6]uint64{uint64(mem.Page(1).Start)}},
			uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{uint64(mem.Page(1).Start)}})
		c := child(t, f)
		nextFault(t, c, mem.Page(1), uffd.PagefaultRWP)
		if err := c.RWProtect(mem.Page(1), 0); err != nil {
			t.Fatal(err)
		}
		if v := forked.Values(); v[1]&uffdtest.PagemapUffd == 0 || v[2] != 2 {
			t.Errorf("the child's pagemap is %#x, it loaded %d; want the mark and 2", v[1], v[2])
		}
		wantMarked(t, p, mem, "after the fork", 0, 1, 2, 3)
	})
}

func TestRWPExclusive(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureRWP|uffd.FeatureWPHugetlbfsShmem)
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(&uffd.Config{Require: uffd.FeatureRWP})
		if _, err := f.Register(mem.Range, uffd.RegisterWP|uffd.RegisterRWP); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Register(WP|RWP): %v", err)
		}
		for _, mode := range []uffd.RegisterMode{uffd.RegisterWP, uffd.RegisterRWP} {
			register(t, f, mem.Range, mode)
			if _, err := f.Register(mem.Range, uffd.RegisterMissing); !errors.Is(err, unix.EBUSY) {
				t.Errorf("Register that drops %v: %v; want EBUSY", mode, err)
			}
			if err := f.Unregister(mem.Range); err != nil {
				t.Fatal(err)
			}
		}
		plain := p.Open(nil)
		if _, err := plain.Register(mem.Range, uffd.RegisterRWP); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Register(RWP) without the feature: %v", err)
		}
		if err := plain.SetMode(uffd.FeatureRWPAsync, 0); !errors.Is(err, unix.EINVAL) {
			t.Errorf("SetMode without the feature: %v", err)
		}
	})
}

// TestRWPSetModeWakes has every thread try again.
func TestRWPSetModeWakes(t *testing.T) {
	uffdtest.Require(t, bothRWP)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 1)
	f := p.Open(&uffd.Config{Require: uffd.FeatureRWP})
	register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterRWP)
	load := p.Load(mem.Start)
	nextFault(t, f, mem.Range, 0)
	if err := f.SetMode(uffd.FeatureRWPAsync, 0); err != nil {
		t.Fatal(err)
	}
	nextFault(t, f, mem.Range, 0)
	fill(t, f, mem.Kind, mem.Range, 1, 0)
	load.Value()
}
