package uffd_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

var pageSize = os.Getpagesize()

// open opens a userfaultfd of the test process.
func open(t testing.TB, c *uffd.Config) *uffd.File {
	t.Helper()
	f, err := uffd.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// mmap maps n pages of private anonymous memory in the test process. Nothing
// may touch them while they are registered and missing.
func mmap(t testing.TB, n int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

// fdOf returns f's descriptor.
func fdOf(t testing.TB, f *uffd.File) int {
	t.Helper()
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	n := -1
	if err := conn.Control(func(fd uintptr) { n = int(fd) }); err != nil {
		t.Fatal(err)
	}
	return n
}

func countFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestDescriptorFlags(t *testing.T) {
	fd := fdOf(t, open(t, nil))
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("close-on-exec is off: %#x, %v", flags, err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("the descriptor blocks: %#x, %v", flags, err)
	}
}

// Each fault wakes whoever polls the descriptor, so it joins the poller only when
// somebody waits for messages.
func TestHeldIsNotPolled(t *testing.T) {
	f := open(t, nil)
	mem := mmap(t, 1)
	r := uffd.RangeOf(mem)
	if _, err := f.Register(r, uffd.RegisterMissing); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ZeroPage(r, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if isPolled(t, f) {
		t.Error("polled, though nobody has waited")
	}
	if _, err := f.ReadMsg(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("reading: %v", err)
	}
	if !isPolled(t, f) {
		t.Error("not polled after a wait: this test sees nothing")
	}
}

// isPolled reports whether a poller of this process has f.
func isPolled(t *testing.T, f *uffd.File) bool {
	t.Helper()
	infos, err := filepath.Glob("/proc/self/fdinfo/*")
	if err != nil || len(infos) == 0 {
		t.Fatal(infos, err)
	}
	fd := fmt.Sprint(fdOf(t, f))
	for _, name := range infos {
		info, err := os.ReadFile(name)
		if err != nil { // it is closed again
			continue
		}
		for line := range strings.Lines(string(info)) {
			if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "tfd:" && fields[1] == fd {
				return true
			}
		}
	}
	return false
}

func TestNoFDLeaks(t *testing.T) {
	quiet(t, open(t, nil)) // whatever is opened once, the poller for one
	before := countFDs(t)
	for range 20 {
		f := open(t, &uffd.Config{Prefer: ^uffd.Features(0)})
		quiet(t, f)
		f.Close()
		if f, err := uffd.Open(uffd.BestFaults); err == nil {
			f.Close()
		}
		uffd.New(&uffd.Config{Require: 1 << 50})
		uffd.Probe()
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestNegotiation(t *testing.T) {
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	if want, ok := uffdtest.ExpectedMask(); ok && offered != want {
		t.Errorf("the kernel offers %#x, expected %#x", uint64(offered), uint64(want))
	}
	t.Run("nil", func(t *testing.T) {
		if got := open(t, nil).Features(); got != 0 {
			t.Errorf("enabled %v", got)
		}
	})
	t.Run("require", func(t *testing.T) {
		uffdtest.Require(t, uffd.FeatureThreadID)
		if got := open(t, &uffd.Config{Require: uffd.FeatureThreadID}).Features(); got != uffd.FeatureThreadID {
			t.Errorf("enabled %v", got)
		}
	})
	t.Run("prefer everything", func(t *testing.T) {
		f := open(t, &uffd.Config{Prefer: ^uffd.Features(0)})
		want := offered
		if os.Geteuid() != 0 {
			want &^= uffd.FeatureEventFork
		}
		if got := f.Features(); got != want {
			t.Errorf("enabled %v, want %v", got, want)
		}
		adopted := adopt(t, f)
		if got := adopted.Features(); got != want {
			t.Errorf("fdinfo says %v, want %v", got, want)
		}
	})
	t.Run("implied", func(t *testing.T) {
		uffdtest.Require(t, uffd.FeatureWPAsync)
		f := open(t, &uffd.Config{Require: uffd.FeatureWPAsync})
		want := uffd.FeatureWPAsync | uffd.FeatureWPUnpopulated
		if got := f.Features(); got != want {
			t.Errorf("enabled %v, want %v", got, want)
		}
		if got := adopt(t, f).Features(); got != want {
			t.Errorf("fdinfo says %v, want %v", got, want)
		}
	})
	t.Run("missing", func(t *testing.T) {
		want := uffd.Features(1<<50 | 1<<62)
		_, err := uffd.New(&uffd.Config{Require: want | uffd.FeatureThreadID})
		var missing *uffd.FeatureError
		if !errors.As(err, &missing) || missing.Missing != want || missing.Offered != offered {
			t.Fatalf("got %v, want a FeatureError for %v", err, want)
		}
	})
	t.Run("RWP_ASYNC alone", func(t *testing.T) {
		// Preferred, it is left out; required, it is an error.
		f := open(t, &uffd.Config{Prefer: uffd.FeatureRWPAsync})
		if got := f.Features(); got != 0 {
			t.Errorf("enabled %v", got)
		}
		if f, err := uffd.New(&uffd.Config{Require: uffd.FeatureRWPAsync}); err == nil {
			f.Close()
			t.Error("New succeeded")
		}
	})
	t.Run("EVENT_FORK required", func(t *testing.T) {
		f, err := uffd.New(&uffd.Config{Require: uffd.FeatureEventFork})
		if os.Geteuid() == 0 {
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
		} else if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "CAP_SYS_PTRACE") {
			t.Errorf("without privilege: %v", err)
		}
	})
}

// adopt returns a File for a duplicate of f's descriptor.
func adopt(t testing.TB, f *uffd.File) *uffd.File {
	t.Helper()
	fd, err := unix.Dup(fdOf(t, f))
	if err != nil {
		t.Fatal(err)
	}
	adopted, err := uffd.FromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { adopted.Close() })
	return adopted
}

func TestNegotiateOnce(t *testing.T) {
	f, err := uffd.Open(uffd.BestFaults)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// A failure can be tried again.
	var missing *uffd.FeatureError
	if _, _, err := f.API(1 << 50); !errors.As(err, &missing) || missing.Missing != 1<<50 {
		t.Errorf("unknown feature: %v", err)
	}
	offered, ioctls, err := f.API(0)
	if err != nil {
		t.Fatal(err)
	}
	if want, err := uffd.Probe(); err != nil || offered != want {
		t.Errorf("offered %v, Probe says %v, %v", offered, want, err)
	}
	if !ioctls.Has(uffd.IoctlAPI | uffd.IoctlRegister | uffd.IoctlUnregister) {
		t.Errorf("ioctls %v", ioctls)
	}
	if _, _, err := f.API(0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("second API: %v", err)
	}
}

func TestBeforeAPI(t *testing.T) {
	f, err := uffd.Open(uffd.BestFaults)
	if err != nil {
		t.Fatal(err)
	}
	page := uffd.RangeOf(mmap(t, 1))
	for name, call := range methods(page) {
		if name == "API" || name == "Close" {
			continue
		}
		if err := call(f); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "API") {
			t.Errorf("%s: %v, want EINVAL that names API", name, err)
		}
	}
	if f.Features() != 0 {
		t.Errorf("features %v", f.Features())
	}
	// That the poller saw nothing of it shows in that reading works now.
	if _, _, err := f.API(0); err != nil {
		t.Fatal(err)
	}
	quiet(t, f)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for name, call := range methods(page) {
		if err := call(f); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

// methods has each method of File that can fail, applied to a page of memory.
func methods(r uffd.Range) map[string]func(*uffd.File) error {
	src := make([]byte, r.Len)
	return map[string]func(*uffd.File) error{
		"API":             func(f *uffd.File) error { _, _, err := f.API(0); return err },
		"Register":        func(f *uffd.File) error { _, err := f.Register(r, uffd.RegisterMissing); return err },
		"Unregister":      func(f *uffd.File) error { return f.Unregister(r) },
		"Wake":            func(f *uffd.File) error { return f.Wake(r) },
		"Copy":            func(f *uffd.File) error { _, err := f.Copy(r.Start, src, 0); return err },
		"ZeroPage":        func(f *uffd.File) error { _, err := f.ZeroPage(r, 0); return err },
		"Continue":        func(f *uffd.File) error { _, err := f.Continue(r, 0); return err },
		"Poison":          func(f *uffd.File) error { _, err := f.Poison(r, 0); return err },
		"Move":            func(f *uffd.File) error { _, err := f.Move(r.Start, r, 0); return err },
		"WriteProtect":    func(f *uffd.File) error { return f.WriteProtect(r, 0) },
		"RWProtect":       func(f *uffd.File) error { return f.RWProtect(r, 0) },
		"SetMode":         func(f *uffd.File) error { return f.SetMode(0, 0) },
		"ReadMsg":         func(f *uffd.File) error { _, err := f.ReadMsg(); return err },
		"SetReadDeadline": func(f *uffd.File) error { return f.SetReadDeadline(time.Time{}) },
		"SyscallConn":     func(f *uffd.File) error { _, err := f.SyscallConn(); return err },
		"Close":           func(f *uffd.File) error { return f.Close() },
	}
}

func TestBadRanges(t *testing.T) {
	f := open(t, nil)
	size := uint64(pageSize)
	good := uffd.RangeOf(mmap(t, 2)).Start
	for _, c := range []struct {
		name string
		r    uffd.Range
		want string
	}{
		{"empty", uffd.Range{Start: good}, "empty"},
		{"unaligned start", uffd.Range{Start: good + 1, Len: size}, "address is not a multiple"},
		{"unaligned length", uffd.Range{Start: good, Len: size + 1}, "length is not a multiple"},
		{"overflow", uffd.Range{Start: -uffd.Addr(size), Len: 2 * size}, "past the end of the address space"},
		{"above user space", uffd.Range{Start: -uffd.Addr(2 * size), Len: size}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.want == "" {
				uffdtest.RequireArch(t, "an end of user space below that of the address space", "s390x")
			}
			for name, call := range methods(c.r) {
				switch name {
				case "API", "ReadMsg", "SetReadDeadline", "SyscallConn", "SetMode", "Close":
					continue
				case "Copy": // allocates its source
					if c.r.Len > 2*size {
						continue
					}
				}
				err := call(f)
				if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%s: %v, want EINVAL that says %q", name, err, c.want)
				}
			}
		})
	}
	t.Run("move", func(t *testing.T) {
		src := uffd.Range{Start: good, Len: size}
		for dst, want := range map[uffd.Addr]string{good + 1: "destination is not a multiple", -uffd.Addr(size): "destination runs past"} {
			if _, err := f.Move(dst, src, 0); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), want) {
				t.Errorf("to %v: %v, want EINVAL that says %q", dst, err, want)
			}
		}
	})
}

func TestBadInput(t *testing.T) {
	f := open(t, nil)
	mem := mmap(t, 4)
	all := uffd.RangeOf(mem)
	page := func(i int) uffd.Range {
		return uffd.Range{Start: all.Start + uffd.Addr(i*pageSize), Len: uint64(pageSize)}
	}
	register(t, f, page(0), uffd.RegisterMissing)
	other := open(t, nil)
	around := mmap(t, 3) // so that no larger mapping goes where the hole is
	holeRange := uffd.RangeOf(around[pageSize : 2*pageSize])
	if _, _, e := unix.Syscall(unix.SYS_MUNMAP, uintptr(holeRange.Start), uintptr(pageSize), 0); e != 0 {
		t.Fatal(e)
	}
	source := make([]byte, pageSize)

	foreign := unix.EINVAL
	if major, minor := uffdtest.Kernel(); major < 6 || major == 6 && minor < 17 {
		foreign = 0 // other userfaultfds of the process could unregister
	}
	for _, c := range []struct {
		name string
		call func() error
		want unix.Errno
	}{
		{"unmapped", func() error { _, err := f.Register(holeRange, uffd.RegisterMissing); return err }, unix.EINVAL},
		{"no mode", func() error { _, err := f.Register(page(1), 0); return err }, unix.EINVAL},
		{"unknown mode", func() error { _, err := f.Register(page(1), 1<<40); return err }, unix.EINVAL},
		{"minor on anonymous memory", func() error { _, err := f.Register(page(1), uffd.RegisterMinor); return err }, unix.EINVAL},
		{"registered elsewhere", func() error { _, err := other.Register(page(0), uffd.RegisterMissing); return err }, unix.EBUSY},
		{"registered here", func() error { _, err := f.Register(page(0), uffd.RegisterMissing); return err }, 0},
		{"unregister unmapped", func() error { return f.Unregister(holeRange) }, unix.EINVAL},
		{"unregister unregistered", func() error { return f.Unregister(page(1)) }, 0},
		{"unregister elsewhere", func() error { err := other.Unregister(page(0)); f.Register(page(0), uffd.RegisterMissing); return err }, foreign},
		{"wake unregistered", func() error { return f.Wake(page(1)) }, 0},
		{"nil source", func() error { _, err := f.Copy(page(0).Start, nil, 0); return err }, unix.EINVAL},
		{"empty source", func() error { _, err := f.Copy(page(0).Start, []byte{}, 0); return err }, unix.EINVAL},
		{"short source", func() error { _, err := f.Copy(page(0).Start, source[1:], 0); return err }, unix.EINVAL},
		{"unknown copy mode", func() error { _, err := f.Copy(page(0).Start, source, 1<<40); return err }, unix.EINVAL},
		{"copy to unregistered", func() error { _, err := f.Copy(page(1).Start, source, 0); return err }, unix.ENOENT},
		{"copy to unmapped", func() error { _, err := f.Copy(holeRange.Start, source, 0); return err }, unix.ENOENT},
		{"WP without registration", func() error { _, err := f.Copy(page(0).Start, source, uffd.CopyWP); return err }, unix.EINVAL},
		{"zeropage to unregistered", func() error { _, err := f.ZeroPage(page(1), 0); return err }, unix.ENOENT},
		{"no buffer", func() error { _, err := f.ReadMsgs(nil); return err }, unix.EINVAL},
		{"empty buffer", func() error { _, err := f.ReadMsgs([]uffd.Msg{}); return err }, unix.EINVAL},
		{"switch an unswitchable feature", func() error { return f.SetMode(uffd.FeatureSigbus, 0) }, unix.EINVAL},
		{"not a fork event", func() error { _, err := f.Child(new(uffd.Msg)); return err }, unix.EINVAL},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.call()
			if c.want == 0 && err != nil || c.want != 0 && !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			var e *uffd.Error
			if err != nil && !errors.As(err, &e) {
				t.Errorf("%T is no *Error", err)
			}
		})
	}
	if n, err := f.Copy(page(0).Start, source, 0); n != int64(pageSize) || err != nil {
		t.Errorf("what is right fails too: %d, %v", n, err)
	}
}

// A source whose second page cannot be read gives one page, and then the reason.
func TestCopySourceEndsEarly(t *testing.T) {
	f := open(t, nil)
	dst := uffd.RangeOf(mmap(t, 2))
	register(t, f, dst, uffd.RegisterMissing)
	src := mmap(t, 2)
	if err := unix.Mprotect(src[pageSize:], unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	n, err := f.Copy(dst.Start, src, 0)
	if n != int64(pageSize) || !errors.Is(err, uffd.ErrRetry) {
		t.Errorf("Copy = %d, %v; want one page and ErrRetry", n, err)
	}
	n, err = f.Copy(dst.Skip(n).Start, src[pageSize:], 0)
	if n != 0 || !errors.Is(err, unix.EFAULT) {
		t.Errorf("the rest = %d, %v; want 0, EFAULT", n, err)
	}
}

func TestFromFD(t *testing.T) {
	if _, err := uffd.FromFD(-1); !errors.Is(err, unix.EBADF) {
		t.Errorf("-1: %v", err)
	}
	if _, err := uffd.FromFD(1 << 20); !errors.Is(err, unix.EBADF) {
		t.Errorf("a closed descriptor: %v", err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if _, err := uffd.FromFD(int(null.Fd())); !errors.Is(err, unix.EBADF) {
		t.Errorf("/dev/null: %v", err)
	}

	// One that has not been through API stays the caller's, and can go there.
	f, err := uffd.Open(uffd.UserFaults)
	if err != nil {
		f, err = uffd.Open(uffd.BestFaults)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	raw := rawUffd(t)
	if _, err := uffd.FromFD(raw); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "API") {
		t.Errorf("before API: %v", err)
	}
	if _, err := unix.FcntlInt(uintptr(raw), unix.F_GETFD, 0); err != nil {
		t.Errorf("the refused descriptor was closed: %v", err)
	}
	unix.Close(raw)

	// What a peer sends need be neither close-on-exec nor non-blocking.
	dup, err := unix.Dup(fdOf(t, open(t, nil)))
	if err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(dup, false)
	adopted, err := uffd.FromFD(dup)
	if err != nil {
		t.Fatal(err)
	}
	defer adopted.Close()
	if only, known := adopted.UserModeOnly(); only || known {
		t.Errorf("UserModeOnly = %v, %v", only, known)
	}
	quiet(t, adopted)
	if flags, _ := unix.FcntlInt(uintptr(dup), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 {
		t.Error("not close-on-exec")
	}
}

// rawUffd opens a userfaultfd without this package's help.
func rawUffd(t testing.TB) int {
	t.Helper()
	for _, mode := range []uintptr{0, 1} {
		if fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|mode, 0, 0); e == 0 {
			return int(fd)
		}
	}
	t.Fatal("cannot open a userfaultfd")
	return -1
}

func TestDeadline(t *testing.T) {
	f := open(t, nil)
	f.SetReadDeadline(time.Now().Add(-time.Second))
	if _, err := f.ReadMsg(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	// One that is set while a reader waits ends the wait.
	f.SetReadDeadline(time.Time{})
	result := make(chan error)
	go func() { _, err := f.ReadMsg(); result <- err }()
	time.Sleep(10 * time.Millisecond)
	f.SetReadDeadline(time.Now())
	wait(t, result, os.ErrDeadlineExceeded)
}

// TestDeadlineBeforeMessages has messages wait: a deadline that is over and Close
// come first, also for readers that have not had to wait.
func TestDeadlineBeforeMessages(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 8)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	for i := range 8 {
		p.Load(mem.Page(i).Start)
	}
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		next(t, f)
		conn.Control(func(fd uintptr) {
			ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if n, err := unix.Poll(ready, int(uffdtest.Patience.Milliseconds())); n != 1 || err != nil {
				t.Fatalf("no message waits: %d, %v", n, err)
			}
		})
		f.SetReadDeadline(time.Now().Add(-time.Second))
		if m, err := f.ReadMsg(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("after the deadline: %v, %v", m, err)
		}
		f.SetReadDeadline(time.Time{})
		next(t, f)
	}
	f.Close()
	if m, err := f.ReadMsg(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v, %v", m, err)
	}
}

// wait checks what ends a goroutine.
func wait(t testing.TB, result <-chan error, want error) {
	t.Helper()
	select {
	case err := <-result:
		if !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	case <-time.After(uffdtest.Patience):
		t.Fatal("still waits")
	}
}

// TestConcurrentReaders has several goroutines serve one descriptor: each fault
// is read by one of them.
func TestConcurrentReaders(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 256)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	const readers = 4
	results := make(chan error, readers)
	for range readers {
		go func() {
			msgs := make([]uffd.Msg, 3)
			for {
				n, err := f.ReadMsgs(msgs)
				if err != nil {
					results <- err
					return
				}
				for i := range msgs[:n] {
					fault, ok := msgs[i].Pagefault()
					if !ok {
						results <- fmt.Errorf("got %v", &msgs[i])
						return
					}
					page := uffd.Range{Start: fault.Addr, Len: uint64(mem.Kind.PageSize())}
					_, err := f.ZeroPage(page, 0)
					if errors.Is(err, fs.ErrExist) { // the other thread was first
						err = f.Wake(page)
					}
					if err != nil {
						results <- err
						return
					}
				}
			}
		}()
	}
	first, second := p.Touch(mem), p.Touch(mem)
	first.Value()
	second.Value()
	f.Close()
	for range readers {
		wait(t, results, os.ErrClosed)
	}
}

func TestCloseEndsReaders(t *testing.T) {
	f := open(t, nil)
	result := make(chan error)
	const readers = 4
	for range readers {
		go func() { _, err := f.ReadMsg(); result <- err }()
	}
	time.Sleep(10 * time.Millisecond)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	for range readers {
		wait(t, result, os.ErrClosed)
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
}

// Close waits for a call that is under way, here one whose source is not there
// yet, and ends the wait of readers meanwhile.
func TestCloseWaitsForCalls(t *testing.T) {
	uffdtest.RequireAllFaults(t)
	f := open(t, &uffd.Config{Faults: uffd.AllFaults})
	dst := uffd.RangeOf(mmap(t, 32))
	register(t, f, dst, uffd.RegisterMissing)
	slow := mmap(t, 32) // more than is copied without the scheduler
	server := open(t, &uffd.Config{Faults: uffd.AllFaults})
	register(t, server, uffd.RangeOf(slow), uffd.RegisterMissing)

	copied := make(chan error, 1)
	go func() { _, err := f.Copy(dst.Start, slow, 0); copied <- err }()
	m := next(t, server)
	fault, _ := m.Pagefault()
	reader := make(chan error, 1)
	go func() { _, err := f.ReadMsg(); reader <- err }()
	time.Sleep(10 * time.Millisecond) // it waits before Close begins
	closed := make(chan error, 1)
	go func() { closed <- f.Close() }()
	wait(t, reader, os.ErrClosed)
	select {
	case <-closed:
		t.Error("Close did not wait")
	case <-copied:
		t.Error("Copy ended without its source")
	case <-time.After(20 * time.Millisecond):
	}
	if !uffd.RangeOf(slow).Contains(fault.Addr) {
		t.Errorf("fault at %v", fault.Addr)
	}
	if _, err := server.ZeroPage(uffd.RangeOf(slow), 0); err != nil {
		t.Fatal(err)
	}
	wait(t, copied, nil)
	wait(t, closed, nil)
}

// Calls race with Close, and with other descriptors that get the same number.
// None may reach one that is not theirs.
func TestCloseRace(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	mem := uffd.RangeOf(mmap(t, 1))
	rounds := 300
	if testing.Short() {
		rounds = 30
	}
	for range rounds {
		f := open(t, nil)
		register(t, f, mem, uffd.RegisterMissing)
		var wg sync.WaitGroup
		var started atomic.Int32
		for range 3 {
			wg.Go(func() {
				src := make([]byte, pageSize)
				for {
					started.Add(1)
					_, err := f.Copy(mem.Start, src, 0)
					if errors.Is(err, os.ErrClosed) {
						return
					}
					if err != nil && !errors.Is(err, unix.EEXIST) {
						t.Errorf("Copy during Close: %v", err)
						return
					}
				}
			})
			wg.Go(func() {
				if _, err := f.ReadMsg(); !errors.Is(err, os.ErrClosed) {
					t.Errorf("ReadMsg during Close: %v", err)
				}
			})
		}
		for started.Load() < int32(1+random.IntN(20)) {
			runtime.Gosched()
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		// Whoever uses the number now uses this.
		null, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		null.Close()
		unix.Madvise(unsafeBytes(mem), unix.MADV_DONTNEED)
	}
}

func TestUnreachableFileStaysOpen(t *testing.T) {
	fd := func() int {
		f, err := uffd.New(nil) // nothing may hold f: no Cleanup
		if err != nil {
			t.Fatal(err)
		}
		return fdOf(t, f)
	}()
	for range 5 {
		runtime.GC()
		time.Sleep(time.Millisecond) // finalizers run
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil || !strings.Contains(string(info), "API:") {
		t.Fatalf("the descriptor was closed: %s, %v", info, err)
	}
}

// A second API while a call is under way does not wait for it, nor does anybody
// wait behind it.
func TestAPIDuringCalls(t *testing.T) {
	f := open(t, nil)
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	page := uffd.RangeOf(mmap(t, 1))
	result := make(chan error, 2)
	err = conn.Control(func(uintptr) {
		go func() { _, _, err := f.API(0); result <- err }()
		wait(t, result, unix.EINVAL)
		go func() { result <- f.Wake(page) }()
		wait(t, result, nil)
	})
	if err != nil {
		t.Error(err)
	}
}

// Close closes once, whoever has the number by then.
func TestSecondCloseClosesNothing(t *testing.T) {
	for _, api := range []bool{false, true} {
		f, err := uffd.Open(uffd.BestFaults)
		if err != nil {
			t.Fatal(err)
		}
		if api {
			if _, _, err := f.API(0); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		var others []*os.File // one of them has the number
		for range 8 {
			null, err := os.Open("/dev/null")
			if err != nil {
				t.Fatal(err)
			}
			others = append(others, null)
		}
		if err := f.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("second Close: %v", err)
		}
		for _, other := range others {
			if err := other.Close(); err != nil {
				t.Errorf("the second Close closed another file: %v", err)
			}
		}
	}
}

// A peer that shares the open file and clears O_NONBLOCK must not be able to
// block us.
func TestPeerClearsNonblock(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 8)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	peer, err := unix.Dup(fdOf(t, f))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(peer)
	clear := func() {
		if err := unix.SetNonblock(peer, false); err != nil {
			t.Fatal(err)
		}
	}
	clear()
	quiet(t, f) // the deadline works
	for i := range mem.Pages() {
		clear()
		load := p.Load(mem.Page(i).Start)
		nextFault(t, f, mem.Page(i), 0)
		if _, err := f.Copy(mem.Page(i).Start, page(mem.Kind, 3), 0); err != nil {
			t.Fatal(err)
		}
		if b := load.Value(); b != 3 {
			t.Errorf("loaded %d", b)
		}
		if i%2 == 0 {
			clear()
			quiet(t, f)
		}
	}
	// Close works too while a reader waits.
	clear()
	f.SetReadDeadline(time.Time{})
	result := make(chan error)
	go func() { _, err := f.ReadMsg(); result <- err }()
	time.Sleep(10 * time.Millisecond)
	f.Close()
	wait(t, result, os.ErrClosed)
}

func TestSyscallConn(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 1)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	p.Load(mem.Start)
	tries := 0
	err = conn.Read(func(fd uintptr) bool {
		tries++
		var raw [32]byte
		n, err := unix.Read(int(fd), raw[:])
		return n == len(raw) && err == nil && raw[0] == byte(uffd.EventPagefault)
	})
	if err != nil || tries == 0 {
		t.Errorf("Read: %v after %d tries", err, tries)
	}
	if err := conn.Write(func(uintptr) bool { return true }); !errors.Is(err, unix.EBADF) {
		t.Errorf("Write: %v", err)
	}
	f.SetReadDeadline(time.Now().Add(-time.Second))
	if err := conn.Read(func(uintptr) bool { return false }); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read after the deadline: %v", err)
	}
	f.Close()
	if err := conn.Control(func(uintptr) { t.Error("called after Close") }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Control after Close: %v", err)
	}
	if err := conn.Read(func(uintptr) bool { t.Error("called after Close"); return true }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read after Close: %v", err)
	}
}

// More messages than fit one read of the kernel's come in one call.
func TestReadMsgsReturnsAll(t *testing.T) {
	p := uffdtest.Start(t)
	const n = 40
	mem := p.Map(uffdtest.Anon, n)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	for i := range n {
		p.Load(mem.Page(i).Start)
	}
	info := fmt.Sprintf("/proc/self/fdinfo/%d", fdOf(t, f))
	for pending := 0; pending != n; time.Sleep(time.Millisecond) {
		text, err := os.ReadFile(info)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Sscanf(string(text[strings.Index(string(text), "pending:"):]), "pending: %d", &pending)
	}
	seen := make(map[uffd.Addr]bool)
	msgs := make([]uffd.Msg, 100)
	read := func(msgs []uffd.Msg, want int) {
		t.Helper()
		got, err := f.ReadMsgs(msgs)
		if err != nil || got != want {
			t.Errorf("ReadMsgs = %d, %v; want %d", got, err, want)
		}
		for i := range msgs[:got] {
			fault, _ := msgs[i].Pagefault()
			seen[fault.Addr] = true
		}
	}
	read(msgs[:3], 3)
	read(msgs[:5], 5)
	read(msgs, n-8) // 32, two full reads: there is no waiting for a third
	if len(seen) != n {
		t.Errorf("%d different pages, want %d", len(seen), n)
	}
}

// unsafeBytes is the memory of this process at r.
func unsafeBytes(r uffd.Range) []byte {
	a := uintptr(r.Start)
	return unsafe.Slice(*(**byte)(unsafe.Pointer(&a)), r.Len)
}
