package uffd_test

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// The tests of this file, and of its siblings for events, write protection,
// moving and stress, follow the kernel's own: each test of uffd-unit-tests has
// one of the same name here.

// eachKind runs test on n pages of each kind of memory, in a process of its own.
func eachKind(t *testing.T, kinds []uffdtest.Kind, n int, test func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory)) {
	for _, kind := range kinds {
		t.Run(kind.String(), func(t *testing.T) {
			if kind.Huge() {
				uffdtest.LockSettings(t).HugePages(2 * n) // private ones may be copied
			}
			p := uffdtest.Start(t)
			test(t, p, p.Map(kind, n))
		})
	}
}

var sharedKinds = []uffdtest.Kind{uffdtest.Shmem, uffdtest.Hugetlb}

// requireWP skips t unless memory of this kind can be write-protected.
func requireWP(t testing.TB, kind uffdtest.Kind) {
	t.Helper()
	uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
	if kind != uffdtest.Anon {
		uffdtest.Require(t, uffd.FeatureWPHugetlbfsShmem)
	}
}

// requireMinor skips t unless memory of this kind has minor faults.
func requireMinor(t testing.TB, kind uffdtest.Kind) {
	t.Helper()
	if kind.Huge() {
		uffdtest.Require(t, uffd.FeatureMinorHugetlbfs)
	} else {
		uffdtest.Require(t, uffd.FeatureMinorShmem)
	}
}

// retry repeats call while it has nothing done and says ErrRetry: for a moment
// after an event was read.
func retry(t testing.TB, call func() (int64, error)) (n int64, err error) {
	t.Helper()
	for end := time.Now().Add(uffdtest.Patience); ; time.Sleep(time.Millisecond) {
		n, err = call()
		if n != 0 || !errors.Is(err, uffd.ErrRetry) {
			return n, err
		}
		if time.Now().After(end) {
			t.Fatalf("nothing but %v for %v", err, uffdtest.Patience)
		}
	}
}

// fill copies a page full of b to r.
func fill(t testing.TB, f *uffd.File, kind uffdtest.Kind, r uffd.Range, b byte, mode uffd.CopyMode) {
	t.Helper()
	src := page(kind, b)
	n, err := retry(t, func() (int64, error) { return f.Copy(r.Start, src, mode) })
	if n != int64(len(src)) || err != nil {
		t.Fatalf("Copy to %v = %d, %v", r.Start, n, err)
	}
}

// wantErr fails unless a call that installs pages has done nothing, with err.
func wantErr(t testing.TB, call string, n int64, err, want error) {
	t.Helper()
	if n != 0 || !errors.Is(err, want) {
		t.Errorf("%s = %d, %v; want 0, %v", call, n, err, want)
	}
}

func protect(t testing.TB, f *uffd.File, r uffd.Range, mode uffd.WriteProtectMode) {
	t.Helper()
	_, err := retry(t, func() (int64, error) { return 0, f.WriteProtect(r, mode) })
	if err != nil {
		t.Fatalf("WriteProtect(%v, %v): %v", r, mode, err)
	}
}

func sigbus(t testing.TB, c *uffdtest.Call, what string) {
	t.Helper()
	if v, err := c.Result(); err != uffdtest.ErrSigbus {
		t.Errorf("%s = %v, %v; want SIGBUS", what, v, err)
	}
}

func TestAPI(t *testing.T) {
	ways := map[string]func(t *testing.T) (*uffd.File, error){
		"all faults": func(t *testing.T) (*uffd.File, error) {
			uffdtest.RequireAllFaults(t)
			return uffd.Open(uffd.AllFaults)
		},
		"user faults": func(t *testing.T) (*uffd.File, error) {
			uffdtest.RequireUserFaults(t)
			return uffd.Open(uffd.UserFaults)
		},
		"device": func(t *testing.T) (*uffd.File, error) {
			uffdtest.RequireRoot(t)
			uffdtest.RequireFile(t, "/dev/userfaultfd", "6.1")
			dev, err := os.Open("/dev/userfaultfd")
			if err != nil {
				return nil, err
			}
			defer dev.Close()
			return uffd.OpenDevice(dev, uffd.AllFaults)
		},
	}
	for name, open := range ways {
		t.Run(name, func(t *testing.T) {
			f, err := open(t)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.Register(uffd.Range{Start: 1 << 20, Len: 1 << 20}, uffd.RegisterMissing); !errors.Is(err, unix.EINVAL) {
				t.Errorf("Register before API: %v", err)
			}
			const unknown = uffd.Features(1) << 63
			var missing *uffd.FeatureError
			if _, _, err := f.API(unknown); !errors.As(err, &missing) || missing.Missing != unknown {
				t.Errorf("API(%v): %v", unknown, err)
			}
			offered, ioctls, err := f.API(0)
			if err != nil {
				t.Fatal(err)
			}
			if want := uffd.IoctlAPI | uffd.IoctlRegister | uffd.IoctlUnregister; !ioctls.Has(want) {
				t.Errorf("ioctls %v lack %v", ioctls, want&^ioctls)
			}
			if probed, err := uffd.Probe(); probed != offered || err != nil {
				t.Errorf("API offers %v, Probe %v, %v", offered, probed, err)
			}
			if f.Features() != 0 {
				t.Errorf("Features = %v after API(0)", f.Features())
			}
			if _, _, err := f.API(0); !errors.Is(err, unix.EINVAL) {
				t.Errorf("second API: %v", err)
			}
		})
	}
}

// rawOpen opens a userfaultfd without the library.
func rawOpen(t *testing.T) int {
	t.Helper()
	const userModeOnly = 1 // Linux 5.11
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|userModeOnly, 0, 0)
	if e == unix.EINVAL {
		uffdtest.RequireAllFaults(t)
		fd, _, e = unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	}
	if e != 0 {
		t.Fatal(e)
	}
	t.Cleanup(func() { unix.Close(int(fd)) })
	return int(fd)
}

// rawAPI makes the call that a File makes in its way only.
func rawAPI(fd int, api uint64, features uffd.Features) unix.Errno {
	arg := struct{ api, features, ioctls uint64 }{api, uint64(features), 0}
	request, _ := uffd.IoctlAPI.Request()
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&arg)))
	return e
}

func TestOtherAPI(t *testing.T) {
	fd := rawOpen(t)
	for _, api := range []uint64{0xab, 0, 1<<32 | 0xaa} {
		if e := rawAPI(fd, api, 0); e != unix.EINVAL {
			t.Errorf("UFFDIO_API with api %#x: %v; want EINVAL", api, e)
		}
	}
	if e := rawAPI(fd, 0xaa, 0); e != 0 {
		t.Errorf("UFFDIO_API after those: %v", e)
	}
}

// TestFromFDBeforeAPI adopts a descriptor that is not ready to be.
func TestFromFDBeforeAPI(t *testing.T) {
	uffdtest.RequireUserFaults(t)
	const userModeOnly = 1
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|userModeOnly, 0, 0)
	if e != 0 {
		t.Fatal(e)
	}
	if _, err := uffd.FromFD(int(fd)); !errors.Is(err, unix.EINVAL) {
		t.Errorf("FromFD: %v", err)
	}
	if err := unix.Close(int(fd)); err != nil {
		t.Errorf("the descriptor is not the caller's any more: %v", err)
	}
}

func TestRegisterIoctls(t *testing.T) {
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(nil)
		supported := uffd.RegisterMissing
		base := uffd.IoctlWake | uffd.IoctlCopy
		wp, minor := uffd.FeatureWPHugetlbfsShmem, uffd.FeatureMinorShmem
		switch {
		case mem.Kind.Huge():
			minor = uffd.FeatureMinorHugetlbfs
		case mem.Kind == uffdtest.Anon:
			wp, minor = uffd.FeaturePagefaultFlagWP, 1<<63
			fallthrough
		default:
			base |= uffd.IoctlZeroPage
			if offered.Has(uffd.FeatureMove) {
				base |= uffd.IoctlMove
			}
		}
		if offered.Has(uffd.FeaturePoison) {
			base |= uffd.IoctlPoison
		}
		if offered.Has(wp) {
			supported |= uffd.RegisterWP
		}
		if offered.Has(minor) {
			supported |= uffd.RegisterMinor
		}
		for mode := uffd.RegisterMode(0); mode < uffd.RegisterRWP; mode++ {
			ioctls, err := f.Register(mem.Range, mode)
			if mode == 0 || !supported.Has(mode) {
				if !errors.Is(err, unix.EINVAL) {
					t.Errorf("Register(%v) = %v, %v; want EINVAL", mode, ioctls, err)
				}
				continue
			}
			want := base
			if mode.Has(uffd.RegisterWP) {
				want |= uffd.IoctlWriteProtect
			}
			if mode.Has(uffd.RegisterMinor) {
				want |= uffd.IoctlContinue
			}
			if ioctls != want || err != nil {
				t.Errorf("Register(%v) = %v, %v; want %v", mode, ioctls, err, want)
			}
			if err := f.Unregister(mem.Range); err != nil {
				t.Errorf("Unregister: %v", err)
			}
		}
	})
}

// TestKinds wants the kinds of memory to be what they are called.
func TestKinds(t *testing.T) {
	eachKind(t, uffdtest.Kinds, 1, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		if n := p.Smaps(mem.Start, "KernelPageSize"); n != uint64(mem.Kind.PageSize()) {
			t.Errorf("pages of %d bytes, want %d", n, mem.Kind.PageSize())
		}
		flags := strings.Fields(p.VMFlags(mem.Start))
		if has := slices.Contains(flags, "sh"); has != mem.Kind.Shared() {
			t.Errorf("flags %v: shared %v, want %v", flags, has, mem.Kind.Shared())
		}
		if has := slices.Contains(flags, "ht"); has != mem.Kind.Huge() {
			t.Errorf("flags %v: hugetlb %v, want %v", flags, has, mem.Kind.Huge())
		}
		if has := mem.FD >= 0; has != (mem.Kind != uffdtest.Anon) {
			t.Errorf("file %v: %v", mem.FD, has)
		}
		p.Store(mem.Start, 7).Value()
		if mem.FD >= 0 { // what is private does not reach the file
			want := uint64(0)
			if mem.Kind.Shared() {
				want = 7
			}
			if b := p.Load(p.Alias(mem).Start).Value(); b != want {
				t.Errorf("the file holds %d, want %d", b, want)
			}
		}
	})
}

func TestZeroPage(t *testing.T) {
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(nil)
		ioctls := register(t, f, mem.Range, uffd.RegisterMissing)
		check := p.Check(mem.Page(1), 0)
		nextFault(t, f, mem.Page(1), 0)
		n, err := f.ZeroPage(mem.Page(1), 0)
		if mem.Kind.Huge() {
			if ioctls.Has(uffd.IoctlZeroPage) {
				t.Errorf("ioctls %v", ioctls)
			}
			wantErr(t, "ZeroPage", n, err, unix.EINVAL)
			fill(t, f, mem.Kind, mem.Page(1), 0, 0)
		} else if n != int64(mem.Kind.PageSize()) || err != nil {
			t.Fatalf("ZeroPage = %d, %v", n, err)
		}
		if bad := check.Value(); bad != 0 {
			t.Errorf("%d bytes of the zero page are not 0", bad)
		}
		if mem.Kind.Huge() {
			return
		}
		n, err = f.ZeroPage(mem.Page(1), 0)
		wantErr(t, "second ZeroPage", n, err, unix.EEXIST)
		if mem.Kind.Shared() {
			alias := p.Alias(mem)
			register(t, f, alias.Range, uffd.RegisterMissing)
			n, err = f.ZeroPage(alias.Page(1), 0)
			wantErr(t, "ZeroPage of an alias", n, err, unix.EEXIST)
		}
		quiet(t, f)
	})
}

func TestMinor(t *testing.T) { testMinor(t, false) }

func TestMinorWP(t *testing.T) { testMinor(t, true) }

func testMinor(t *testing.T, wp bool) {
	eachKind(t, sharedKinds, 4, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		requireMinor(t, mem.Kind)
		mode, register1, continueMode := &uffd.Config{}, uffd.RegisterMinor, uffd.ContinueMode(0)
		if wp {
			requireWP(t, mem.Kind)
			mode.Require = uffd.FeatureWPUnpopulated
			uffdtest.Require(t, mode.Require)
			register1, continueMode = uffd.RegisterMinor|uffd.RegisterWP, uffd.ContinueWP
		}
		f := p.Open(mode)
		register(t, f, mem.Range, register1)
		alias := p.Alias(mem)
		for i := range mem.Pages() {
			p.Fill(alias.Page(i), byte(10+i)).Value()
		}
		quiet(t, f) // the alias is not registered

		for i := range mem.Pages() {
			check := p.Check(mem.Page(i), byte(100+i))
			nextFault(t, f, mem.Page(i), uffd.PagefaultMinor)
			p.Fill(alias.Page(i), byte(100+i)).Value() // what the handler does is seen
			n, err := f.Continue(mem.Page(i), continueMode)
			if n != int64(mem.Kind.PageSize()) || err != nil {
				t.Fatalf("Continue = %d, %v", n, err)
			}
			if bad := check.Value(); bad != 0 {
				t.Errorf("page %d: %d bytes differ", i, bad)
			}
			n, err = f.Continue(mem.Page(i), continueMode)
			wantErr(t, "second Continue", n, err, unix.EEXIST)
		}
		p.Touch(mem).Value()
		quiet(t, f)

		store := p.Store(mem.Page(2).Start+1, 7)
		if wp {
			nextFault(t, f, mem.Page(2), uffd.PagefaultWrite|uffd.PagefaultWP)
			protect(t, f, mem.Page(2), 0)
		}
		store.Value()
		if b := p.Load(alias.Page(2).Start + 1).Value(); b != 7 {
			t.Errorf("the alias reads %d, want 7", b)
		}
		quiet(t, f)
	})
}

// TestMinorDontneed discards the mapping of a page, which is still in the file.
func TestMinorDontneed(t *testing.T) {
	eachKind(t, sharedKinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		requireMinor(t, mem.Kind)
		if mem.Kind.Huge() {
			uffdtest.RequireKernel(t, 5, 18, "MADV_DONTNEED of hugetlb memory")
		}
		f := p.Open(nil)
		p.Fill(mem.Range, 1).Value()
		register(t, f, mem.Range, uffd.RegisterMinor)
		p.Madvise(mem.Page(1), unix.MADV_DONTNEED).Value()
		store := p.Store(mem.Page(1).Start, 9)
		nextFault(t, f, mem.Page(1), uffd.PagefaultMinor|uffd.PagefaultWrite)
		if n, err := f.Continue(mem.Page(1), 0); n != int64(mem.Kind.PageSize()) || err != nil {
			t.Fatalf("Continue = %d, %v", n, err)
		}
		store.Value()
		p.Store(mem.Page(0).Start, 9).Value()
		quiet(t, f)
	})
}

func TestContinueWithoutPage(t *testing.T) {
	eachKind(t, sharedKinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		requireMinor(t, mem.Kind)
		f := p.Open(nil)
		register(t, f, mem.Range, uffd.RegisterMinor)
		n, err := f.Continue(mem.Page(0), 0)
		wantErr(t, "Continue", n, err, unix.EFAULT)
	})
}

func TestMinorCollapse(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	uffdtest.RequireKernel(t, 6, 1, "MADV_COLLAPSE")
	thp := uffdtest.RequireTHP(t)
	p := uffdtest.Start(t)
	pageSize := uint64(uffdtest.Shmem.PageSize())
	mem := aligned(p.Map(uffdtest.Shmem, int(2*thp/pageSize)), thp)
	p.Mmap(mem.Start, thp, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED, mem.FD)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMinor)
	alias := p.Alias(mem)
	p.Fill(alias.Range, 5).Value()
	check := p.Check(mem.Range, 6)
	for i := range mem.Pages() {
		nextFault(t, f, mem.Page(i), uffd.PagefaultMinor)
		if i == 0 {
			p.Fill(alias.Range, 6).Value()
		}
		if n, err := f.Continue(mem.Page(i), 0); n != int64(pageSize) || err != nil {
			t.Fatalf("Continue = %d, %v", n, err)
		}
	}
	if bad := check.Value(); bad != 0 {
		t.Errorf("%d bytes differ", bad)
	}
	p.Munmap(alias.Range).Value()
	if _, err := p.Madvise(mem.Range, unix.MADV_COLLAPSE).Result(); err != nil {
		t.Fatalf("MADV_COLLAPSE: %v", err)
	}
	p.Touch(mem).Value()
	if n := p.Smaps(mem.Start, "ShmemPmdMapped"); n != thp {
		t.Errorf("%d bytes are mapped as a huge page, want %d", n, thp)
	}
	if bad := p.Check(mem.Range, 6).Value(); bad != 0 {
		t.Errorf("after the collapse %d bytes differ", bad)
	}
	quiet(t, f)
}

// aligned is the part of m that is one huge page; m is twice as long.
func aligned(m uffdtest.Memory, size uint64) uffdtest.Memory {
	m.Start = (m.Start + uffd.Addr(size) - 1) &^ uffd.Addr(size-1)
	m.Len = size
	return m
}

func TestPoison(t *testing.T) {
	uffdtest.PoisonBug.Avoid(t)
	uffdtest.Require(t, uffd.FeaturePoison)
	eachKind(t, uffdtest.Kinds, 4, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		if mem.Kind.Huge() {
			uffdtest.PoisonHugetlb.Avoid(t)
		}
		f := p.Open(nil)
		register(t, f, mem.Range, uffd.RegisterMissing)
		signals := 0
		for i := range mem.Pages() {
			check := p.Check(mem.Page(i), 0)
			nextFault(t, f, mem.Page(i), 0)
			if i%2 == 0 {
				n, err := f.Poison(mem.Page(i), 0)
				if n != int64(mem.Kind.PageSize()) || err != nil {
					t.Fatalf("Poison = %d, %v", n, err)
				}
			} else {
				fill(t, f, mem.Kind, mem.Page(i), 0, 0)
			}
			v, err := check.Result()
			switch {
			case err == uffdtest.ErrSigbus:
				signals++
			case err != nil:
				t.Fatal(err)
			case v[0] != 0:
				t.Errorf("page %d: %d bytes are not 0", i, v[0])
			}
		}
		if signals != 2 {
			t.Errorf("%d accesses raised SIGBUS, want 2", signals)
		}
		for i, want := range []error{unix.EEXIST, unix.EEXIST} {
			n, err := f.Poison(mem.Page(i), 0)
			wantErr(t, "second Poison", n, err, want)
		}
		fill(t, f, mem.Kind, mem.Page(0), 3, 0) // replaces the poison
		if b := p.Load(mem.Page(0).Start).Value(); b != 3 {
			t.Errorf("loaded %d, want 3", b)
		}
		quiet(t, f)
	})
}

func TestPoisonPopulate(t *testing.T) {
	uffdtest.PoisonBug.Avoid(t)
	uffdtest.Require(t, uffd.FeaturePoison)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	if n, err := f.Poison(mem.Page(1), 0); n != int64(mem.Kind.PageSize()) || err != nil {
		t.Fatalf("Poison = %d, %v", n, err)
	}
	if _, err := p.Populate(mem.Page(1), false).Result(); err != unix.EHWPOISON {
		t.Errorf("Populate of poisoned memory: %v; want EHWPOISON", err)
	}
	p.Madvise(mem.Page(1), unix.MADV_DONTNEED).Value()
	load := p.Load(mem.Page(1).Start)
	nextFault(t, f, mem.Page(1), 0) // the poison is gone
	fill(t, f, mem.Kind, mem.Page(1), 4, 0)
	load.Value()
}

// waitReadable waits for a message and leaves it there.
func waitReadable(t testing.TB, f *uffd.File) {
	t.Helper()
	conn, err := f.SyscallConn()
	if err == nil {
		err = f.SetReadDeadline(time.Now().Add(uffdtest.Patience))
	}
	if err == nil {
		err = conn.Read(func(fd uintptr) bool {
			ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, _ := unix.Poll(ready, 0)
			return n > 0 && ready[0].Revents&unix.POLLIN != 0
		})
	}
	if err != nil {
		t.Fatalf("waiting for a message: %v", err)
	}
}

// waiting returns how many threads wait for f to resolve a fault.
func waiting(t testing.TB, f *uffd.File) (n int) {
	t.Helper()
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info []byte
	if err := conn.Control(func(fd uintptr) {
		info, err = os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	}); err != nil {
		t.Fatal(err)
	}
	_, total, ok := strings.Cut(string(info), "total:")
	if _, scanErr := fmt.Sscan(total, &n); err != nil || !ok || scanErr != nil {
		t.Fatalf("fdinfo is %q, %v", info, err)
	}
	return n
}

// waitWaiting waits until n threads wait.
func waitWaiting(t testing.TB, f *uffd.File, n int) {
	t.Helper()
	for end := time.Now().Add(uffdtest.Patience); waiting(t, f) != n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d threads wait, want %d", waiting(t, f), n)
		}
	}
}

func TestMmapChanging(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Shmem, 4)
	anon := p.Map(uffdtest.Anon, 2)
	optional := uffd.FeatureMinorShmem | uffd.FeaturePoison | uffd.FeatureMove
	f := p.Open(&uffd.Config{Require: uffd.FeatureEventRemove, Prefer: optional})

	calls := map[string]func() (int64, error){
		"Copy":         func() (int64, error) { return f.Copy(mem.Page(0).Start, page(mem.Kind, 1), 0) },
		"ZeroPage":     func() (int64, error) { return f.ZeroPage(mem.Page(0), 0) },
		"WriteProtect": func() (int64, error) { return 0, f.WriteProtect(anon.Page(0), uffd.WriteProtectWP) },
		"Continue":     func() (int64, error) { return f.Continue(mem.Page(0), 0) },
		"Poison":       func() (int64, error) { return f.Poison(mem.Page(0), 0) },
		"Move": func() (int64, error) {
			v, err := p.Move(anon.Page(1).Start, anon.Page(0), 0).Result()
			if errors.Is(err, unix.EAGAIN) {
				err = uffd.ErrRetry // an errno is all that the process sends
			}
			return int64(v[0]), err
		},
	}
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	mode := uffd.RegisterMissing
	if !offered.Has(uffd.FeatureMinorShmem) {
		delete(calls, "Continue")
	} else {
		mode |= uffd.RegisterMinor
	}
	if !offered.Has(uffd.FeaturePoison) {
		delete(calls, "Poison")
	}
	if !offered.Has(uffd.FeatureMove) {
		delete(calls, "Move")
	}
	anonMode := uffd.RegisterMissing
	if !offered.Has(uffd.FeaturePagefaultFlagWP) {
		delete(calls, "WriteProtect")
	} else {
		anonMode |= uffd.RegisterWP
	}

	p.Fill(anon.Page(0), 1).Value()
	register(t, f, anon.Range, anonMode)
	register(t, f, mem.Range, mode)
	fill(t, f, mem.Kind, mem.Page(3), 1, 0)
	remove := p.Madvise(mem.Page(3), unix.MADV_REMOVE)
	waitReadable(t, f)
	for name, call := range calls {
		n, err := call()
		wantErr(t, name, n, err, uffd.ErrRetry)
	}
	if err := f.Wake(mem.Range); err != nil { // works all the same
		t.Errorf("Wake: %v", err)
	}
	m := next(t, f)
	if r, ok := m.Remove(); !ok || r != mem.Page(3) {
		t.Errorf("got %v, want REMOVE %v", &m, mem.Page(3))
	}
	remove.Value()
	fill(t, f, mem.Kind, mem.Page(0), 2, 0)
	if b := p.Load(mem.Page(0).Start).Value(); b != 2 {
		t.Errorf("loaded %d, want 2", b)
	}
}

// TestPartial fills a range with a page in its middle that is there already: the
// call says how far it came, and the call for the rest why.
func TestPartial(t *testing.T) {
	type call func(f *uffd.File, r uffd.Range) (int64, error)
	tests := []struct {
		name string
		kind uffdtest.Kind
		mode uffd.RegisterMode
		need uffd.Features
		call call
	}{
		{"Copy", uffdtest.Anon, uffd.RegisterMissing, 0, func(f *uffd.File, r uffd.Range) (int64, error) {
			return f.Copy(r.Start, make([]byte, r.Len), 0)
		}},
		{"ZeroPage", uffdtest.Anon, uffd.RegisterMissing, 0, func(f *uffd.File, r uffd.Range) (int64, error) {
			return f.ZeroPage(r, 0)
		}},
		{"Continue", uffdtest.Shmem, uffd.RegisterMinor, uffd.FeatureMinorShmem, func(f *uffd.File, r uffd.Range) (int64, error) {
			return f.Continue(r, 0)
		}},
		{"Poison", uffdtest.Anon, uffd.RegisterMissing, uffd.FeaturePoison, func(f *uffd.File, r uffd.Range) (int64, error) {
			return f.Poison(r, 0)
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			uffdtest.Require(t, test.need)
			if test.need.Has(uffd.FeaturePoison) {
				uffdtest.PoisonBug.Avoid(t)
			}
			p := uffdtest.Start(t)
			mem := p.Map(test.kind, 4)
			if test.mode == uffd.RegisterMinor {
				p.Fill(p.Alias(mem).Range, 0).Value()
			}
			p.Store(mem.Page(2).Start, 9).Value() // there before it is registered
			f := p.Open(nil)
			register(t, f, mem.Range, test.mode)
			waiter := p.Load(mem.Page(1).Start)
			next(t, f)

			size := int64(mem.Kind.PageSize())
			n, err := test.call(f, mem.Range)
			if n != 2*size || !errors.Is(err, uffd.ErrRetry) {
				t.Fatalf("%d, %v; want %d, ErrRetry", n, err, 2*size)
			}
			waiter.Result() // was woken: poisoned or not
			n, err = test.call(f, mem.Range.Skip(n))
			wantErr(t, test.name+" of the rest", n, err, unix.EEXIST)
			n, err = test.call(f, mem.Page(3))
			if n != size || err != nil {
				t.Errorf("behind the page: %d, %v", n, err)
			}
			if b := p.Load(mem.Page(2).Start).Value(); b != 9 {
				t.Errorf("the page in the middle reads %d, want 9", b)
			}
		})
	}
}

// TestWake goes through what does not wake a thread that waits.
func TestWake(t *testing.T) {
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(nil)
		register(t, f, mem.Range, uffd.RegisterMissing)
		src := page(mem.Kind, 1)
		load := p.Load(mem.Page(1).Start)
		nextFault(t, f, mem.Page(1), 0)
		still := func(after string) {
			t.Helper()
			if n := waiting(t, f); n != 1 {
				t.Fatalf("%d threads wait after %s, want 1", n, after)
			}
		}
		if n, err := f.Copy(mem.Page(1).Start, src, uffd.CopyDontWake); n != int64(len(src)) || err != nil {
			t.Fatalf("Copy = %d, %v", n, err)
		}
		still("CopyDontWake")
		n, err := f.Copy(mem.Page(1).Start, src, 0)
		wantErr(t, "Copy", n, err, unix.EEXIST)
		still("EEXIST")
		if err := f.Wake(mem.Page(0)); err != nil {
			t.Fatal(err)
		}
		still("Wake of another page")
		if err := f.Wake(mem.Page(1)); err != nil {
			t.Fatal(err)
		}
		if b := load.Value(); b != 1 {
			t.Errorf("loaded %d", b)
		}

		load = p.Load(mem.Page(0).Start)
		nextFault(t, f, mem.Page(0), 0)
		if err := f.Wake(mem.Range); err != nil {
			t.Fatal(err)
		}
		nextFault(t, f, mem.Page(0), 0) // nothing has changed: it comes again
		fill(t, f, mem.Kind, mem.Page(0), 2, 0)
		load.Value()
		quiet(t, f)
	})
}

func TestDontWake(t *testing.T) {
	p := uffdtest.Start(t)
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	mem := p.Map(uffdtest.Shmem, 3)
	f := p.Open(nil)
	mode := uffd.RegisterMissing
	if offered.Has(uffd.FeatureMinorShmem) {
		mode |= uffd.RegisterMinor
		p.Fill(mem.Page(1), 1).Value()
		p.Madvise(mem.Page(1), unix.MADV_DONTNEED).Value()
	}
	register(t, f, mem.Range, mode)
	calls := []func(r uffd.Range) (int64, error){
		func(r uffd.Range) (int64, error) { return f.ZeroPage(r, uffd.ZeroPageDontWake) },
	}
	if mode.Has(uffd.RegisterMinor) {
		calls = append(calls, func(r uffd.Range) (int64, error) { return f.Continue(r, uffd.ContinueDontWake) })
		if offered.Has(uffd.FeaturePoison) && !uffdtest.PoisonBug.Here() {
			calls = append(calls, func(r uffd.Range) (int64, error) { return f.Poison(r, uffd.PoisonDontWake) })
		}
	}
	for i, call := range calls {
		r := mem.Page(i)
		load := p.Load(r.Start)
		next(t, f)
		if n, err := call(r); n != int64(r.Len) || err != nil {
			t.Fatalf("call %d: %d, %v", i, n, err)
		}
		if n := waiting(t, f); n != 1 {
			t.Errorf("call %d: %d threads wait, want 1", i, n)
		}
		if err := f.Wake(r); err != nil {
			t.Fatal(err)
		}
		load.Result()
		if n := waiting(t, f); n != 0 {
			t.Errorf("call %d: %d threads wait after Wake", i, n)
		}
	}
}

// TestForeign works on memory through another userfaultfd of the process.
func TestForeign(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	owner, other := p.Open(nil), p.Open(nil)
	register(t, owner, mem.Range, uffd.RegisterMissing)
	if _, err := other.Register(mem.Range, uffd.RegisterMissing); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Register of memory of another: %v; want EBUSY", err)
	}
	load := p.Load(mem.Start)
	nextFault(t, owner, mem.Page(0), 0)
	fill(t, other, mem.Kind, mem.Page(0), 5, 0)
	if n := waiting(t, owner); n != 1 {
		t.Errorf("%d threads wait after the other's Copy, want 1", n)
	}
	n, err := owner.Copy(mem.Start, page(mem.Kind, 6), 0)
	wantErr(t, "the owner's Copy", n, err, unix.EEXIST)
	if err := owner.Wake(mem.Page(0)); err != nil {
		t.Fatal(err)
	}
	if b := load.Value(); b != 5 {
		t.Errorf("loaded %d, want 5", b)
	}
}

func TestForeignUnregister(t *testing.T) {
	uffdtest.RequireKernel(t, 6, 17, "refusal to unregister memory of another userfaultfd")
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	owner, other := p.Open(nil), p.Open(nil)
	register(t, owner, mem.Range, uffd.RegisterMissing)
	if err := other.Unregister(mem.Range); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Unregister of memory of another: %v; want EINVAL", err)
	}
}

func TestRegisterErrors(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 6)
	file := p.Map(uffdtest.Shmem, 2)
	f := p.Open(nil)
	size := mem.Page(0).Len

	p.Munmap(mem.Page(1)).Value()
	if _, err := f.Register(mem.Page(1), uffd.RegisterMissing); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Register where nothing is mapped: %v", err)
	}
	register(t, f, mem.Range, uffd.RegisterMissing) // the hole is passed over
	n, err := f.Copy(mem.Start, make([]byte, 2*size), 0)
	wantErr(t, "Copy into a hole", n, err, unix.ENOENT)
	p.Mprotect(mem.Page(3), unix.PROT_READ).Value()
	n, err = f.Copy(mem.Page(2).Start, make([]byte, 3*size), 0)
	wantErr(t, "Copy over two mappings", n, err, unix.ENOENT)
	fill(t, f, mem.Kind, mem.Page(3), 1, 0) // the protection is ignored
	if b := p.Load(mem.Page(3).Start).Value(); b != 1 {
		t.Errorf("loaded %d, want 1", b)
	}

	readOnly := uffd.Range{Start: p.Mmap(0, file.Len, unix.PROT_READ, unix.MAP_SHARED, p.OpenReadOnly(file)), Len: file.Len}
	if _, err := f.Register(readOnly, uffd.RegisterMissing); !errors.Is(err, unix.EPERM) {
		t.Errorf("Register of a file that may not be written: %v", err)
	}

	for _, r := range []uffd.Range{
		{Start: mem.Start, Len: 0},
		{Start: mem.Start + 1, Len: size},
		{Start: mem.Start, Len: size - 1},
		{Start: -uffd.Addr(size), Len: 2 * size},
	} {
		if _, err := f.Register(r, uffd.RegisterMissing); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Register(%v): %v", r, err)
		}
	}
	if err := f.Unregister(mem.Range); err != nil {
		t.Errorf("Unregister over a hole: %v", err)
	}
}

// TestRegisterAgain asks for modes that are there already.
func TestRegisterAgain(t *testing.T) {
	uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterWP)
	register(t, f, mem.Range, uffd.RegisterWP) // changes nothing
	load := p.Load(mem.Start)
	nextFault(t, f, mem.Page(0), 0)
	fill(t, f, mem.Kind, mem.Page(0), 1, 0)
	load.Value()
	if err := f.Unregister(mem.Range); err != nil {
		t.Fatal(err)
	}
	register(t, f, mem.Range, uffd.RegisterWP)
	p.Load(mem.Page(1).Start).Value() // missing is off now
	quiet(t, f)
}

// TestHugetlbLength passes ranges that are whole pages, but not whole huge ones.
func TestHugetlbLength(t *testing.T) {
	eachKind(t, []uffdtest.Kind{uffdtest.Hugetlb, uffdtest.HugetlbPrivate}, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(nil)
		small := uint64(os.Getpagesize())
		if _, err := f.Register(uffd.Range{Start: mem.Start, Len: small}, uffd.RegisterMissing); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Register of part of a huge page: %v", err)
		}
		register(t, f, mem.Range, uffd.RegisterMissing)
		n, err := f.Copy(mem.Start, make([]byte, small), 0)
		wantErr(t, "Copy of part of a huge page", n, err, unix.EINVAL)

		at := uffd.Range{Start: mem.Start + uffd.Addr(3*small), Len: small}
		load := p.Load(at.Start)
		if fault := nextFault(t, f, mem.Page(0), 0); fault.Addr != mem.Start {
			t.Errorf("fault at %v, want %v", fault.Addr, mem.Start)
		}
		if err := f.Wake(at); err != nil {
			t.Fatal(err)
		}
		if n := waiting(t, f); n != 1 {
			t.Errorf("%d threads wait after Wake of part of a huge page, want 1", n)
		}
		fill(t, f, mem.Kind, mem.Page(0), 1, 0)
		load.Value()
		if err := f.Unregister(uffd.Range{Start: mem.Start, Len: small}); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Unregister of part of a huge page: %v", err)
		}
	})
}

func TestExactAddress(t *testing.T) {
	requireExactAddress(t)
	uffdtest.PageForExact.Avoid(t)
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		f := p.Open(&uffd.Config{Require: uffd.FeatureExactAddress})
		register(t, f, mem.Range, uffd.RegisterMissing)
		a := mem.Page(1).Start + uffd.Addr(mem.Kind.PageSize()) - 1
		load := p.Load(a)
		if fault := nextFault(t, f, mem.Page(1), 0); fault.Addr != a {
			t.Errorf("fault at %v, want %v", fault.Addr, a)
		}
		fill(t, f, mem.Kind, mem.Page(1), 1, 0)
		load.Value()
	})
}

func requireExactAddress(t *testing.T) {
	t.Helper()
	uffdtest.RequireArch(t, "a processor that tells the exact address", "s390x")
	uffdtest.Require(t, uffd.FeatureExactAddress)
}

func TestPageAddress(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	load := p.Load(mem.Page(1).Start + 17)
	if fault := nextFault(t, f, mem.Page(1), 0); fault.Addr != mem.Page(1).Start || fault.ThreadID != 0 {
		t.Errorf("fault at %v of thread %d, want %v and 0", fault.Addr, fault.ThreadID, mem.Page(1).Start)
	}
	fill(t, f, mem.Kind, mem.Page(1), 1, 0)
	load.Value()
}

// load-thread returns its thread and the byte at an address.
var _ = uffdtest.Handle("load-thread", func(args []uint64) ([]uint64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b := uffdtest.BytesAt(args[0], 1)[0]
	return []uint64{uint64(unix.Gettid()), uint64(b)}, nil
})

func TestThreadID(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(&uffd.Config{Require: uffd.FeatureThreadID})
	register(t, f, mem.Range, uffd.RegisterMissing)
	threads := make(map[uint64]bool)
	calls := [2]*uffdtest.Call{p.Run("load-thread", uint64(mem.Start)), p.Run("load-thread", uint64(mem.Start))}
	for range calls { // two threads on one page, two messages
		threads[uint64(nextFault(t, f, mem.Page(0), 0).ThreadID)] = true
	}
	fill(t, f, mem.Kind, mem.Page(0), 8, 0)
	for _, c := range calls {
		if v := c.Values(); !threads[v[0]] || v[1] != 8 {
			t.Errorf("thread %d loaded %d; the faults were of %v", v[0], v[1], threads)
		}
	}
	if len(threads) != 2 {
		t.Errorf("the faults were of %v", threads)
	}
}

// TestClose has waiting threads go on with zeros.
func TestClose(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	check := p.Check(mem.Range, 0)
	nextFault(t, f, mem.Page(0), 0)
	p.Close().Value()
	if n := waiting(t, f); n != 1 {
		t.Errorf("%d threads wait while one descriptor is open, want 1", n)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if bad := check.Value(); bad != 0 {
		t.Errorf("%d bytes are not 0", bad)
	}
}

// TestKernelFaults has the kernel touch a missing page.
func TestKernelFaults(t *testing.T) {
	random := func(p *uffdtest.Process, r uffd.Range) *uffdtest.Call {
		return p.Syscall(unix.SYS_GETRANDOM, uint64(r.Start), 1, 0)
	}
	t.Run("user", func(t *testing.T) {
		uffdtest.RequireUserFaults(t)
		p := uffdtest.Start(t)
		mem := p.Map(uffdtest.Anon, 1)
		f := p.Open(&uffd.Config{Faults: uffd.UserFaults})
		register(t, f, mem.Range, uffd.RegisterMissing)
		if v, err := random(p, mem.Range).Result(); err != unix.EFAULT {
			t.Errorf("getrandom = %d, %v; want EFAULT", v, err)
		}
		quiet(t, f)
	})
	t.Run("all", func(t *testing.T) {
		uffdtest.RequireAllFaults(t)
		p := uffdtest.Start(t)
		mem := p.Map(uffdtest.Anon, 1)
		f := p.Open(&uffd.Config{Faults: uffd.AllFaults})
		register(t, f, mem.Range, uffd.RegisterMissing)
		call := random(p, mem.Range)
		nextFault(t, f, mem.Range, uffd.PagefaultWrite)
		fill(t, f, mem.Kind, mem.Range, 0, 0)
		if n := call.Value(); n != 1 {
			t.Errorf("getrandom = %d", n)
		}
	})
}
