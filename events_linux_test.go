package uffd_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

func TestSigbus(t *testing.T) { testSigbus(t, false) }

func TestSigbusWP(t *testing.T) { testSigbus(t, true) }

// testSigbus has every page raise a signal where a message would come, once for
// the missing page and with wp once more for the protected one.
func testSigbus(t *testing.T, wp bool) {
	eachKind(t, uffdtest.Kinds, 3, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		mode, copyMode := uffd.RegisterMissing, uffd.CopyMode(0)
		if wp {
			requireWP(t, mem.Kind)
			mode, copyMode = mode|uffd.RegisterWP, uffd.CopyWP
		}
		f := p.Open(&uffd.Config{Require: uffd.FeatureSigbus})
		register(t, f, mem.Range, mode)
		for i := range mem.Pages() {
			a := mem.Page(i).Start + 3
			sigbus(t, p.Store(a, 1), "store to a missing page")
			fill(t, f, mem.Kind, mem.Page(i), 9, copyMode)
			if wp {
				sigbus(t, p.Store(a, 1), "store to a protected page")
				protect(t, f, mem.Page(i), 0)
			}
			p.Store(a, byte(i)).Value()
			if b := p.Load(a).Value(); b != uint64(i) {
				t.Errorf("page %d reads %d", i, b)
			}
		}
		quiet(t, f)
	})
}

func TestSigbusFork(t *testing.T) { testSigbusFork(t, false) }

func TestSigbusForkWP(t *testing.T) { testSigbusFork(t, true) }

// testSigbusFork has forked processes raise the signal: for a missing page, with
// wp also for a protected one, and not where the page was installed for them.
func testSigbusFork(t *testing.T, wp bool) {
	uffdtest.RequireEventFork(t)
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		mode, copyMode := uffd.RegisterMissing, uffd.CopyMode(0)
		if wp {
			requireWP(t, mem.Kind)
			if mem.Kind == uffdtest.HugetlbPrivate {
				uffdtest.ForkedWPHugetlb.Avoid(t)
			}
			mode, copyMode = mode|uffd.RegisterWP, uffd.CopyWP
		}
		f := p.Open(&uffd.Config{Require: uffd.FeatureSigbus | uffd.FeatureEventFork})
		register(t, f, mem.Range, mode)
		first, second := uint64(mem.Page(0).Start), uint64(mem.Page(1).Start)
		fork := func(steps ...uffdtest.Step) (*uffdtest.Call, *uffd.File) {
			t.Helper()
			forked := p.Fork(append([]uffdtest.Step{{Op: uffdtest.StepGate}}, steps...)...)
			c := child(t, f)
			if want := uffd.FeatureSigbus | uffd.FeatureEventFork; c.Features() != want {
				t.Errorf("the child has %v, want %v", c.Features(), want)
			}
			return forked, c
		}
		load := func(a uint64) uffdtest.Step { return uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{a}} }
		store := func(a uint64) uffdtest.Step {
			return uffdtest.Step{Op: uffdtest.StepStore, Args: [6]uint64{a, 9}}
		}

		forked, c := fork(load(second), load(first))
		fill(t, c, mem.Kind, mem.Page(1), 7, copyMode)
		p.OpenGate()
		sigbus(t, forked, "load of a missing page in the child")
		quiet(t, c)

		// Of shared memory, what the first child was given is in the file.
		install := func(c *uffd.File) {
			t.Helper()
			if !mem.Kind.Shared() {
				fill(t, c, mem.Kind, mem.Page(1), 7, copyMode)
			} else if wp {
				protect(t, c, mem.Page(1), uffd.WriteProtectWP)
			}
		}
		if wp {
			forked, c = fork(load(second), store(second))
			install(c)
			p.OpenGate()
			sigbus(t, forked, "store to a protected page in the child")
			quiet(t, c)
		}
		forked, c = fork(load(second), store(second), load(second))
		install(c)
		if wp {
			protect(t, c, mem.Page(1), 0)
		}
		p.OpenGate()
		if v := forked.Values(); v[2] != 7 || v[4] != 9 {
			t.Errorf("the child loaded %d and %d, want 7 and 9", v[2], v[4])
		}
		quiet(t, c)
		quiet(t, f)
	})
}

// child returns the userfaultfd of a process that is being forked.
func child(t testing.TB, f *uffd.File) *uffd.File {
	t.Helper()
	m := next(t, f)
	c, err := f.Child(&m)
	if err != nil {
		t.Fatalf("%v: %v", &m, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestEvents(t *testing.T) { testEvents(t, false) }

func TestEventsWP(t *testing.T) { testEvents(t, true) }

// testEvents follows a forked process: it faults half of its memory in, moves
// the memory elsewhere, faults the other half in and discards all.
func testEvents(t *testing.T, wp bool) {
	uffdtest.RequireEventFork(t)
	eachKind(t, uffdtest.Kinds, 4, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		mode, copyMode := uffd.RegisterMissing, uffd.CopyMode(0)
		if wp {
			requireWP(t, mem.Kind)
			mode, copyMode = mode|uffd.RegisterWP, uffd.CopyWP
		}
		if mem.Kind.Huge() {
			uffdtest.RequireKernel(t, 5, 18, "MADV_DONTNEED and mremap of hugetlb memory")
		}
		f := p.Open(&uffd.Config{Require: uffd.FeatureEventFork | uffd.FeatureEventRemap | uffd.FeatureEventRemove})
		register(t, f, mem.Range, mode)
		to := mem
		to.Start = reserve(p, mem.Kind, mem.Len)
		discard := unix.MADV_DONTNEED
		if mem.Kind.Shared() {
			discard = unix.MADV_REMOVE
		}

		// Each page is written by a store of its number, then compared.
		var steps []uffdtest.Step
		step := func(op uffdtest.StepOp, args ...uint64) {
			s := uffdtest.Step{Op: op}
			copy(s.Args[:], args)
			steps = append(steps, s)
		}
		visit := func(r uffd.Range, i int) {
			step(uffdtest.StepStore, uint64(r.Start), uint64(i))
			step(uffdtest.StepCheck, uint64(r.Start), r.Len, uint64(i))
		}
		half := mem.Pages() / 2
		for i := range half {
			visit(mem.Page(i), i)
		}
		step(uffdtest.StepMremap, uint64(mem.Start), mem.Len, mem.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uint64(to.Start))
		for i := half; i < mem.Pages(); i++ {
			visit(to.Page(i), i)
		}
		for i := range half {
			step(uffdtest.StepCheck, uint64(to.Page(i).Start), to.Page(i).Len, uint64(i))
		}
		step(uffdtest.StepMadvise, uint64(to.Start), to.Len, uint64(discard))
		step(uffdtest.StepCheck, uint64(to.Start), to.Len, 0)
		forked := p.Fork(steps...)

		c := child(t, f)
		serve := func(r uffd.Range, i int) {
			t.Helper()
			nextFault(t, c, r, uffd.PagefaultWrite)
			fill(t, c, mem.Kind, r, byte(i), copyMode)
			if wp {
				nextFault(t, c, r, uffd.PagefaultWrite|uffd.PagefaultWP)
				protect(t, c, r, 0)
			}
		}
		for i := range half {
			serve(mem.Page(i), i)
		}
		m := next(t, c)
		if r, ok := m.Remap(); !ok || r != (uffd.Remap{From: mem.Start, To: to.Start, Len: mem.Len}) {
			t.Fatalf("got %v, want REMAP %v to %v", &m, mem.Range, to.Start)
		}
		for i := half; i < mem.Pages(); i++ {
			serve(to.Page(i), i)
		}
		m = next(t, c)
		if r, ok := m.Remove(); !ok || r != to.Range {
			t.Fatalf("got %v, want REMOVE %v", &m, to.Range)
		}
		if err := c.Unregister(to.Range); err != nil {
			t.Fatal(err)
		}
		values := forked.Values()
		for i, s := range steps {
			if v := values[1+i]; s.Op == uffdtest.StepCheck && v != 0 {
				t.Errorf("step %d: %d bytes are wrong", i, v)
			} else if s.Op == uffdtest.StepMadvise && v != 0 {
				t.Errorf("madvise failed")
			}
		}
		quiet(t, c)
		quiet(t, f)
	})
}

// reserve returns an address that memory of a kind can be moved to.
func reserve(p *uffdtest.Process, kind uffdtest.Kind, length uint64) uffd.Addr {
	size := uint64(kind.PageSize())
	r := uffd.Range{Len: length + size}
	r.Start = p.Mmap(0, r.Len, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE, -1)
	return (r.Start + uffd.Addr(size-1)) &^ uffd.Addr(size-1)
}

func TestChild(t *testing.T) {
	uffdtest.RequireEventFork(t)
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(&uffd.Config{Require: uffd.FeatureEventFork | uffd.FeatureThreadID})
	register(t, f, mem.Range, uffd.RegisterMissing)
	forked := p.Fork(uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{uint64(mem.Page(1).Start)}})
	m := next(t, f)
	if _, err := f.Child(new(uffd.Msg)); !errors.Is(err, unix.EINVAL) {
		t.Errorf("Child of another message: %v", err)
	}
	c, err := f.Child(&m)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, ok := m.Fork(); ok {
		t.Error("the message offers its descriptor after Child")
	}
	if _, err := f.Child(&m); !errors.Is(err, unix.EINVAL) {
		t.Errorf("second Child: %v", err)
	}
	if want := uffd.FeatureEventFork | uffd.FeatureThreadID; c.Features() != want {
		t.Errorf("the child has %v, want %v", c.Features(), want)
	}
	if _, _, err := c.API(0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("API of the child: %v", err)
	}
	fault := nextFault(t, c, mem.Page(1), 0)
	fill(t, c, mem.Kind, mem.Page(1), 6, 0)
	v := forked.Values()
	if v[1] != 6 {
		t.Errorf("the child loaded %d", v[1])
	}
	if uint64(fault.ThreadID) != v[0] {
		t.Errorf("thread %d faulted, the child is %d", fault.ThreadID, v[0])
	}
	if p.Pagemap(mem.Page(1).Start)&uffdtest.PagemapPresent != 0 {
		t.Error("the page was installed in the parent")
	}
	n, err := c.Copy(mem.Start, page(mem.Kind, 1), 0)
	wantErr(t, "Copy into a process that is gone", n, err, uffd.ErrGone)
}

// TestForkWithoutEvent has the child's memory be ordinary.
func TestForkWithoutEvent(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	v := p.Fork(uffdtest.Step{Op: uffdtest.StepCheck, Args: [6]uint64{uint64(mem.Start), mem.Len}}).Values()
	if v[1] != 0 {
		t.Errorf("%d bytes of the child are not 0", v[1])
	}
	quiet(t, f)
}

func TestUnmapEvent(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 4)
	f := p.Open(&uffd.Config{Require: uffd.FeatureEventUnmap})
	register(t, f, mem.Range, uffd.RegisterMissing)
	want := func(r uffd.Range) {
		t.Helper()
		m := next(t, f)
		if got, ok := m.Unmap(); !ok || got != r {
			t.Errorf("got %v, want UNMAP %v", &m, r)
		}
	}
	last := uffd.Range{Start: mem.Page(2).Start, Len: 2 * mem.Page(2).Len}
	unmap := p.Munmap(last)
	waitReadable(t, f)
	n, err := f.Copy(mem.Start, page(mem.Kind, 1), 0)
	wantErr(t, "Copy while an event waits", n, err, uffd.ErrRetry)
	want(last)
	unmap.Value()
	n, err = retry(t, func() (int64, error) { return f.Copy(mem.Page(2).Start, page(mem.Kind, 1), 0) })
	wantErr(t, "Copy to unmapped memory", n, err, unix.ENOENT)

	shrink := p.Mremap(uffd.Range{Start: mem.Start, Len: 2 * mem.Page(0).Len}, mem.Page(0).Len, 0, 0)
	want(mem.Page(1))
	shrink.Value()
}

// TestRemapEvent moves memory and makes it longer.
func TestRemapEvent(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	to := p.Map(uffdtest.Anon, 4)
	f := p.Open(&uffd.Config{Require: uffd.FeatureEventRemap})
	register(t, f, mem.Range, uffd.RegisterMissing)
	fill(t, f, mem.Kind, mem.Page(0), 1, 0)
	move := p.Mremap(mem.Range, to.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to.Start)
	m := next(t, f)
	r, ok := m.Remap()
	t.Logf("%v: length %d pages, of %d that become %d", &m, r.Len/mem.Page(0).Len, mem.Pages(), to.Pages())
	if !ok || r.From != mem.Start || r.To != to.Start || r.Len != mem.Len {
		t.Errorf("got %v, want REMAP of %v to %v", &m, mem.Range, to.Start)
	}
	move.Value()
	for i, want := range []uint64{1, 11, 12, 13} { // the new pages are registered too
		load := p.Load(to.Page(i).Start)
		if i > 0 {
			nextFault(t, f, to.Page(i), 0)
			fill(t, f, mem.Kind, to.Page(i), byte(10+i), 0)
		}
		if b := load.Value(); b != want {
			t.Errorf("page %d reads %d, want %d", i, b, want)
		}
	}
	quiet(t, f)
}

// TestRemapWithoutEvent has moved memory be ordinary.
func TestRemapWithoutEvent(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 2)
	to := p.Map(uffdtest.Anon, 2)
	f := p.Open(nil)
	register(t, f, mem.Range, uffd.RegisterMissing)
	p.Mremap(mem.Range, to.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to.Start).Value()
	if bad := p.Check(to.Range, 0).Value(); bad != 0 {
		t.Errorf("%d bytes are not 0", bad)
	}
	quiet(t, f)
}

func TestRemoveEvent(t *testing.T) {
	eachKind(t, uffdtest.Kinds, 2, func(t *testing.T, p *uffdtest.Process, mem uffdtest.Memory) {
		if mem.Kind.Huge() {
			uffdtest.RequireKernel(t, 5, 18, "MADV_DONTNEED of hugetlb memory")
		}
		f := p.Open(&uffd.Config{Require: uffd.FeatureEventRemove})
		register(t, f, mem.Range, uffd.RegisterMissing)
		fill(t, f, mem.Kind, mem.Page(0), 1, 0)
		fill(t, f, mem.Kind, mem.Page(1), 2, 0)
		discard := unix.MADV_DONTNEED
		if mem.Kind.Shared() {
			discard = unix.MADV_REMOVE
		}
		remove := p.Madvise(mem.Page(1), discard)
		waitReadable(t, f)
		if b := p.Load(mem.Page(1).Start).Value(); b != 2 {
			t.Errorf("loaded %d before the event was read", b)
		}
		m := next(t, f)
		if r, ok := m.Remove(); !ok || r != mem.Page(1) {
			t.Errorf("got %v, want REMOVE %v", &m, mem.Page(1))
		}
		remove.Value()
		load := p.Load(mem.Page(1).Start)
		nextFault(t, f, mem.Page(1), 0)
		fill(t, f, mem.Kind, mem.Page(1), 3, 0)
		if b := load.Value(); b != 3 {
			t.Errorf("loaded %d after the page was removed, want 3", b)
		}
		quiet(t, f)
	})
}

// TestMessageOrder has a fault come before the event that happened first.
func TestMessageOrder(t *testing.T) {
	p := uffdtest.Start(t)
	mem := p.Map(uffdtest.Anon, 3)
	f := p.Open(&uffd.Config{Require: uffd.FeatureEventUnmap})
	register(t, f, mem.Range, uffd.RegisterMissing)
	unmap := p.Munmap(mem.Page(2))
	waitReadable(t, f)
	first := p.Load(mem.Page(1).Start)
	msgs := make([]uffd.Msg, 4)
	waitWaiting(t, f, 1)
	n, err := f.ReadMsgs(msgs)
	if n != 2 || err != nil || msgs[0].Event() != uffd.EventPagefault || msgs[1].Event() != uffd.EventUnmap {
		t.Errorf("got %v, %v; want the fault, then the UNMAP", msgs[:n], err)
	}
	unmap.Value()
	fill(t, f, mem.Kind, mem.Page(1), 1, 0)
	first.Value()
}
