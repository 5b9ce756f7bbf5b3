package uffd

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"math"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestRange(t *testing.T) {
	r := Range{0x1000, 0x3000}
	if r.End() != 0x4000 {
		t.Errorf("End = %v", r.End())
	}
	if s := r.String(); s != "[0x1000, 0x4000)" {
		t.Errorf("String = %s", s)
	}
	top := Range{math.MaxUint64 - 0xfff, 0x1000} // ends where addresses do
	for _, c := range []struct {
		r    Range
		a    Addr
		want bool
	}{
		{r, 0xfff, false}, {r, 0x1000, true}, {r, 0x3fff, true}, {r, 0x4000, false},
		{Range{0x1000, 0}, 0x1000, false},
		{top, math.MaxUint64, true}, {top, 0, false},
	} {
		if got := c.r.Contains(c.a); got != c.want {
			t.Errorf("%v.Contains(%v) = %v", c.r, c.a, got)
		}
	}
	for _, c := range []struct {
		n    int64
		want Range
	}{
		{0, r}, {0x1000, Range{0x2000, 0x2000}}, {0x3000, Range{0x4000, 0}},
		{0x5000, Range{0x4000, 0}}, {-1, r}, {math.MinInt64, r},
	} {
		if got := r.Skip(c.n); got != c.want {
			t.Errorf("Skip(%#x) = %v, want %v", c.n, got, c.want)
		}
	}
	if got := RangeOf(nil); got != (Range{}) {
		t.Errorf("RangeOf(nil) = %v", got)
	}
	mem := make([]byte, 10)
	if got := RangeOf(mem[2:5]); got.Len != 3 || got.Start != RangeOf(mem).Start+2 {
		t.Errorf("RangeOf(mem[2:5]) = %v of %v", got, RangeOf(mem))
	}
}

func TestCheck(t *testing.T) {
	size := uint64(os.Getpagesize())
	for _, c := range []struct {
		r    Range
		want refusal
	}{
		{Range{Addr(size), size}, refusalNone},
		{Range{0, size}, refusalNone},
		{Range{Addr(size), 0}, refusalEmpty},
		{Range{Addr(size) + 1, size}, refusalStart},
		{Range{Addr(size), size - 1}, refusalLength},
		{Range{-Addr(size), 2 * size}, refusalOverflow},
		{Range{-Addr(size), -size}, refusalOverflow},
	} {
		if got := c.r.check(); got != c.want {
			t.Errorf("%v: refusal %d, want %d", c.r, got, c.want)
		}
	}
}

func TestSets(t *testing.T) {
	for _, c := range []struct {
		got, want string
	}{
		{Features(0).String(), "0"},
		{(FeatureWPAsync | FeatureEventFork).String(), "EVENT_FORK|WP_ASYNC"},
		{(FeatureMove | 1<<63 | 1<<31).String(), "MOVE|1<<31|1<<63"},
		{(IoctlAPI | IoctlCopy).String(), "COPY|API"},
		{(RegisterMissing | RegisterWP | 1<<9).String(), "MISSING|WP|1<<9"},
		{(CopyDontWake | CopyWP).String(), "DONTWAKE|WP"},
		{ZeroPageDontWake.String(), "DONTWAKE"},
		{ContinueWP.String(), "WP"},
		{PoisonDontWake.String(), "DONTWAKE"},
		{MoveAllowSrcHoles.String(), "ALLOW_SRC_HOLES"},
		{WriteProtectDontWake.String(), "DONTWAKE"},
		{RWProtectRWP.String(), "RWP"},
		{(PagefaultWrite | PagefaultWP).String(), "WRITE|WP"},

		{FeatureRWP.Since(), "7.3"},
		{(FeatureMove | FeatureEventFork).Since(), "6.8"},
		{(FeatureMinorShmem | FeatureEventFork).Since(), "5.14"}, // 5.14 is newer than 5.7
		{Features(0).Since(), ""},
		{(FeatureMove | 1<<63).Since(), ""},
		{(IoctlCopy | IoctlContinue).Since(), "5.13"},
		{IoctlSetMode.Since(), "7.3"},

		{BestFaults.String(), "BestFaults"},
		{Faults(7).String(), "Faults(7)"},
		{EventRemap.String(), "remap"},
		{Event(0x17).String(), "event 0x17"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
	all := FeatureMove | FeatureEventFork
	if !all.Has(FeatureMove) || all.Has(FeatureMove|FeatureRWP) || !all.Has(0) {
		t.Error("Has")
	}
}

func TestRequest(t *testing.T) {
	if !supported {
		if n, ok := IoctlCopy.Request(); ok {
			t.Errorf("there is a request number %#x here", n)
		}
		return
	}
	for _, f := range sets[ioctlPrefix] {
		n, ok := Ioctls(f.bit).Request()
		if !ok {
			t.Errorf("%s has no request number", f.name)
		}
		if got := uint64(1) << (n & 0x3f); got != f.bit {
			t.Errorf("%s has request number %#x, which is bit %#x", f.name, n, got)
		}
	}
	for _, s := range []Ioctls{0, IoctlCopy | IoctlWake, 1 << 40} {
		if n, ok := s.Request(); ok {
			t.Errorf("%v has request number %#x", s, n)
		}
	}
}

// message builds what the kernel would send.
func message(e Event, union ...uint64) *Msg {
	m := new(Msg)
	m.raw[0] = byte(e)
	for i, v := range union {
		binary.NativeEndian.PutUint64(m.raw[8+8*i:], v)
	}
	return m
}

func TestMsg(t *testing.T) {
	fault := message(EventPagefault, 3, 0x7f0000001000)
	binary.NativeEndian.PutUint32(fault.raw[24:], 77)
	fork := message(EventFork)
	binary.NativeEndian.PutUint32(fork.raw[8:], 9)
	adopted := message(EventFork)
	adopted.adopted()
	remap := message(EventRemap, 0x1000, 0x2000, 0x3000)
	remove := message(EventRemove, 0x1000, 0x3000)
	unmap := message(EventUnmap, 0x5000, 0x6000)
	backwards := message(EventUnmap, 0x6000, 0x5000)
	unknown := message(0x17, 1, 2, 3)

	for _, c := range []struct {
		m    *Msg
		want string
	}{
		{fault, "pagefault 0x7f0000001000 WRITE|WP thread 77"},
		{message(EventPagefault, 0, 0x1000), "pagefault 0x1000"},
		{fork, "fork fd 9"},
		{adopted, "fork adopted"},
		{remap, "remap 0x1000 to 0x2000 length 0x3000"},
		{remove, "remove [0x1000, 0x3000)"},
		{unmap, "unmap [0x5000, 0x6000)"},
		{backwards, "unmap [0x6000, 0x6000)"},
		{unknown, "event 0x17"},
		{new(Msg), "event 0x0"},
	} {
		if got := c.m.String(); got != c.want {
			t.Errorf("String = %q, want %q", got, c.want)
		}
	}
	if p, ok := fault.Pagefault(); !ok || p != (Pagefault{0x7f0000001000, PagefaultWrite | PagefaultWP, 77}) {
		t.Errorf("Pagefault = %+v, %v", p, ok)
	}
	if fd, ok := fork.Fork(); !ok || fd != 9 {
		t.Errorf("Fork = %d, %v", fd, ok)
	}
	if fd, ok := adopted.Fork(); ok {
		t.Errorf("Fork of an adopted message = %d", fd)
	}
	if r, ok := remap.Remap(); !ok || r != (Remap{0x1000, 0x2000, 0x3000}) {
		t.Errorf("Remap = %+v, %v", r, ok)
	}
	if r, ok := remove.Remove(); !ok || r != (Range{0x1000, 0x2000}) {
		t.Errorf("Remove = %v, %v", r, ok)
	}
	if r, ok := unmap.Unmap(); !ok || r != (Range{0x5000, 0x1000}) {
		t.Errorf("Unmap = %v, %v", r, ok)
	}
	checkKinds(t, unknown)
}

// checkKinds checks that m decodes as what it is and as nothing else.
func checkKinds(t *testing.T, m *Msg) {
	t.Helper()
	_, fault := m.Pagefault()
	_, fork := m.Fork()
	_, remap := m.Remap()
	_, remove := m.Remove()
	_, unmap := m.Unmap()
	for _, c := range []struct {
		e  Event
		ok bool
	}{{EventPagefault, fault}, {EventRemap, remap}, {EventRemove, remove}, {EventUnmap, unmap}} {
		if c.ok != (m.Event() == c.e) {
			t.Errorf("%v decodes as %v: %v", m.Event(), c.e, c.ok)
		}
	}
	if fork && m.Event() != EventFork {
		t.Errorf("%v decodes as a fork", m.Event())
	}
}

func FuzzMsg(f *testing.F) {
	for _, m := range []*Msg{
		message(EventPagefault, 1, 0x1000, 7), message(EventFork, 3), message(EventFork, math.MaxUint64),
		message(EventRemap, 1, 2, 3), message(EventRemove, 0x2000, 0x1000), message(EventUnmap, 1, 2), new(Msg),
	} {
		f.Add(m.raw[:])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var m Msg
		copy(m.raw[:], data)
		before := m
		checkKinds(t, &m)
		if m.String() == "" {
			t.Error("no String")
		}
		if p, ok := m.Pagefault(); ok {
			again := message(EventPagefault, uint64(p.Flags), uint64(p.Addr))
			binary.NativeEndian.PutUint32(again.raw[24:], p.ThreadID)
			if q, _ := again.Pagefault(); q != p {
				t.Errorf("%+v became %+v", p, q)
			}
		}
		if r, ok := m.Remove(); ok && uint64(r.Start)+r.Len < r.Len {
			t.Errorf("%v wraps", r)
		}
		if fd, ok := m.Fork(); ok && fd < 0 {
			t.Errorf("fd %d", fd)
		}
		if m != before {
			t.Error("decoding changed the message")
		}
	})
}

func TestErrors(t *testing.T) {
	closed := refusalClosed.error(opCopy)
	missing := &FeatureError{Missing: FeatureRWP | FeatureMove | 1<<50, Offered: FeatureSigbus}
	open := &OpenError{Attempts: []OpenAttempt{{devicePath, syscall.EACCES}, {"userfaultfd(0)", syscall.EPERM}}, Remedy: "do this"}
	deviceOnly := &OpenError{Attempts: []OpenAttempt{{devicePath, syscall.EINVAL}}}
	for _, c := range []struct {
		err, target error
		want        bool
	}{
		{closed, os.ErrClosed, true},
		{closed, os.ErrDeadlineExceeded, false},
		{refusalDeadline.error(opReadMsg), os.ErrDeadlineExceeded, true},
		{refusalEmpty.error(opCopy), syscall.EINVAL, true},
		{refusalEmpty.error(opCopy), ErrRetry, false},
		{refusalUnsupported.error(opCopy), errors.ErrUnsupported, true},
		{missing, errors.ErrUnsupported, true},
		{missing, syscall.EINVAL, false},
		{open, fs.ErrPermission, true},
		{open, syscall.EPERM, true},
		{open, syscall.EACCES, false}, // the system call decides
		{deviceOnly, syscall.EINVAL, true},
		{new(OpenError), syscall.EINVAL, false},
	} {
		if got := errors.Is(c.err, c.target); got != c.want {
			t.Errorf("errors.Is(%v, %v) = %v", c.err, c.target, got)
		}
	}
	for _, c := range []struct {
		err  error
		want []string
	}{
		{closed, []string{"uffd: Copy: ", "closed"}},
		{refusalStart.error(opWake), []string{"uffd: Wake: ", "page size", "invalid"}},
		{missing, []string{"MOVE (Linux 6.8)", "RWP (Linux 7.3)", "1<<50 (unknown)", "SIGBUS"}},
		{open, []string{"/dev/userfaultfd: permission denied", "userfaultfd(0): operation not permitted", "(do this)"}},
	} {
		for _, want := range c.want {
			if !strings.Contains(strings.ToLower(c.err.Error()), strings.ToLower(want)) { // systems differ in case
				t.Errorf("%q lacks %q", c.err, want)
			}
		}
	}
	var e *Error
	if !errors.As(closed, &e) || e.Op != "Copy" {
		t.Errorf("%#v is no *Error of Copy", closed)
	}
	for op, name := range opNames {
		if name == "" {
			t.Errorf("op %d has no name", op)
		}
	}
	for r := refusalNone + 1; r < refusalCount; r++ {
		if refusals[r] == nil {
			t.Errorf("refusal %d has no reason", r)
		}
	}
}

func TestZeroFile(t *testing.T) {
	for _, f := range []*File{nil, {}} {
		want := os.ErrInvalid
		if !supported {
			want = errors.ErrUnsupported
		}
		for op, call := range calls {
			if err := call(f); !errors.Is(err, want) {
				t.Errorf("%s of a File from nowhere: %v, want %v", op, err, want)
			}
		}
	}
}

// calls has each method of File that can fail, with arguments that are fine.
var calls = map[string]func(*File) error{
	"API":          func(f *File) error { _, _, err := f.API(0); return err },
	"Register":     func(f *File) error { _, err := f.Register(aPage, RegisterMissing); return err },
	"Unregister":   func(f *File) error { return f.Unregister(aPage) },
	"Wake":         func(f *File) error { return f.Wake(aPage) },
	"Copy":         func(f *File) error { _, err := f.Copy(aPage.Start, make([]byte, aPage.Len), 0); return err },
	"ZeroPage":     func(f *File) error { _, err := f.ZeroPage(aPage, 0); return err },
	"Continue":     func(f *File) error { _, err := f.Continue(aPage, 0); return err },
	"Poison":       func(f *File) error { _, err := f.Poison(aPage, 0); return err },
	"Move":         func(f *File) error { _, err := f.Move(aPage.Start, aPage, 0); return err },
	"WriteProtect": func(f *File) error { return f.WriteProtect(aPage, 0) },
	"RWProtect":    func(f *File) error { return f.RWProtect(aPage, 0) },
	"SetMode":      func(f *File) error { return f.SetMode(0, 0) },
	"ReadMsg":      func(f *File) error { _, err := f.ReadMsg(); return err },
	"ReadMsgs":     func(f *File) error { _, err := f.ReadMsgs(make([]Msg, 2)); return err },
	"Deadline":     func(f *File) error { return f.SetReadDeadline(time.Time{}) },
	"SyscallConn":  func(f *File) error { _, err := f.SyscallConn(); return err },
	"Close":        func(f *File) error { return f.Close() },
}

var aPage = Range{Addr(16 * os.Getpagesize()), uint64(os.Getpagesize())}

func TestOtherSystems(t *testing.T) {
	if supported {
		return // what follows is for those without
	}
	for name, call := range map[string]func() error{
		"New":        func() error { _, err := New(nil); return err },
		"Open":       func() error { _, err := Open(BestFaults); return err },
		"OpenDevice": func() error { _, err := OpenDevice(os.Stdin, AllFaults); return err },
		"FromFD":     func() error { _, err := FromFD(0); return err },
		"Probe":      func() error { _, err := Probe(); return err },
		"Populate":   func() error { return Populate(make([]byte, 1), true) },
	} {
		if err := call(); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Only files for Linux alone may know its system calls.
func TestImports(t *testing.T) {
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := f.Name()
		if !strings.HasSuffix(name, ".go") || strings.Contains(name, "_linux") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "\t\"golang.org/x/sys") {
			t.Errorf("%s imports golang.org/x/sys: it would not build elsewhere", name)
		}
	}
}
