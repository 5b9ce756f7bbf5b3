package pager_test

import (
	"context"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

func TestPopulate(t *testing.T) {
	const pages = 200
	for name, contents := range sources(t, image(uffdtest.Anon, pages)) {
		t.Run(name, func(t *testing.T) {
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, pages+10)
			s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, contents))
			s.holds(t, mem, 7, 8)
			s.Madvise(mem.Page(3), unix.MADV_DONTNEED).Value()
			var last uint64
			err := s.client.Populate(t.Context(), func(done, total uint64) {
				if done < last || done > total {
					t.Errorf("progress %d of %d, after %d", done, total, last)
				}
				last = done
			})
			if err != nil {
				t.Fatal(err)
			}
			if want := uint64((pages + 8) * pageSize); last != want { // one is there, one discarded
				t.Errorf("%d bytes populated, want %d", last, want)
			}
			missing := s.client.Stats().Missing
			for i := range pages {
				want := byte(i + 1)
				if i == 3 {
					want = 0
				}
				s.holds(t, mem, i, want)
			}
			if n := s.client.Stats().Missing - missing; n != 1 { // the one that was discarded
				t.Errorf("%d faults after Populate, want 1", n)
			}
			s.noErrors(t)
		})
	}
}

func TestPopulateRanges(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 8)
	s := serve(t, proc, f, &pager.Pager{}, region(mem, source.FromBytes(image(uffdtest.Anon, 8))))
	if err := s.client.Populate(t.Context(), nil, mem.Page(1), mem.Page(6)); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		present := s.Pagemap(mem.Page(i).Start)&uffdtest.PagemapPresent != 0
		if present != (i == 1 || i == 6) {
			t.Errorf("page %d present: %v", i, present)
		}
	}
}

// Faults come before Populate, even if all that Populate may have under way is
// stuck.
func TestDemandFirst(t *testing.T) {
	const pages = 512
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, pages)
	gate := make(chan struct{})
	s := serve(t, proc, f, &pager.Pager{Workers: 4, FaultAround: 1}, region(mem, slow{
		source.FromBytes(image(uffdtest.Anon, pages)), map[int64]chan struct{}{0: gate}}))
	result := make(chan error)
	go func() { result <- s.client.Populate(t.Context(), nil) }()
	eventually(t, "Populate reads", func() bool { return s.client.Stats().Reads > 0 })
	s.holds(t, mem, pages-1, byte(pages%256))
	waiting := s.Load(mem.Start) // is being read for Populate
	close(gate)
	if b := waiting.Value(); b != 1 {
		t.Errorf("loaded %d, want 1", b)
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
	for i := range pages {
		s.holds(t, mem, i, byte(i+1))
	}
	s.noErrors(t)
}

func TestPopulateFails(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 8)
	gate := make(chan struct{})
	contents := source.FromBytes(image(uffdtest.Anon, 8))
	s := serve(t, proc, f, &pager.Pager{}, region(mem, slow{failing{contents, func(int64) error { return errInjected }}, map[int64]chan struct{}{0: gate}}))
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() { result <- s.client.Populate(ctx, nil) }()
	eventually(t, "Populate reads", func() bool { return s.client.Stats().Reads > 0 })
	cancel()
	if err := <-result; err != context.Canceled {
		t.Errorf("Populate = %v, want context.Canceled", err)
	}
	close(gate)
	if err := s.client.Populate(t.Context(), nil); !errors.Is(err, errInjected) {
		t.Errorf("Populate = %v, want the source's error", err)
	}
	if err := s.client.Graduate(t.Context(), nil); !errors.Is(err, errInjected) {
		t.Errorf("Graduate = %v, want the source's error", err)
	}
	s.Kill()
	if err := s.end(t); err != nil {
		t.Fatal(err)
	}
	if err := s.client.Populate(t.Context(), nil); err == nil {
		t.Error("Populate of a client that is gone succeeded")
	}
}

// Threads that discard memory while it graduates do not wait for ever, and find
// zeros.
func TestGraduateRace(t *testing.T) {
	const pages, rounds = 64, 20
	for range rounds {
		proc := uffdtest.Start(t)
		mem, f := mapped(t, proc, uffdtest.Anon, pages)
		s := serve(t, proc, f, &pager.Pager{}, region(mem, source.FromBytes(image(uffdtest.Anon, pages))))
		graduated := make(chan error, 1)
		go func() { graduated <- s.client.Graduate(t.Context(), nil) }()
		for i := range pages {
			s.Madvise(mem.Page(i), unix.MADV_DONTNEED).Value()
		}
		if err := <-graduated; err != nil {
			t.Fatal(err)
		}
		for i := range pages {
			s.holds(t, mem, i, 0)
		}
		s.noErrors(t)
		proc.Kill()
	}
}

// After Graduate nothing faults any more, and threads that wait go on.
func TestGraduate(t *testing.T) {
	for _, kind := range []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem} {
		t.Run(kind.String(), func(t *testing.T) {
			proc := uffdtest.Start(t)
			const pages = 100
			mem, f := mapped(t, proc, kind, pages)
			s := serve(t, proc, f, &pager.Pager{}, region(mem, source.FromBytes(image(kind, pages))))
			touch := s.Touch(mem)
			if err := s.client.Graduate(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			touch.Value()
			for i := range pages {
				s.holds(t, mem, i, byte(i+1))
			}
			faults := s.client.Stats().Missing
			advice := unix.MADV_DONTNEED
			if kind.Shared() {
				advice = unix.MADV_REMOVE
			}
			s.Madvise(mem.Range, advice).Value()
			for i := range pages {
				s.holds(t, mem, i, 0)
			}
			if n := s.client.Stats(); n.Missing != faults || n.Removes != 0 {
				t.Errorf("%d faults and %d events after Graduate", n.Missing-faults, n.Removes)
			}
			// Nobody holds it.
			if _, err := f.Register(uffd.Range{Start: mem.Start, Len: mem.Len}, uffd.RegisterMissing); err != nil {
				t.Error(err)
			}
			s.noErrors(t)
		})
	}
}

// Populate finds the memory that is moved while it is under way.
func TestPopulateMoved(t *testing.T) {
	const pages = 200
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, pages)
	gate := make(chan struct{})
	s := serve(t, proc, f, &pager.Pager{Workers: 1, FaultAround: 1}, region(mem, slow{
		source.FromBytes(image(uffdtest.Anon, pages)), map[int64]chan struct{}{0: gate}}))
	result := make(chan error)
	go func() { result <- s.client.Populate(t.Context(), nil) }()
	eventually(t, "Populate reads", func() bool { return s.client.Stats().Reads > 0 })
	tail := uffd.Range{Start: mem.Page(pages - 50).Start, Len: uint64(50 * pageSize)}
	moved := mem
	target := s.Map(uffdtest.Anon, 50).Start
	moved.Start = uffd.Addr(s.Mremap(tail, tail.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, target).Value())
	eventually(t, "the move is known", func() bool { return s.client.Stats().Remaps > 0 })
	close(gate)
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		if s.Pagemap(moved.Page(i).Start)&uffdtest.PagemapPresent == 0 {
			t.Fatalf("page %d of what was moved is missing", i)
		}
		s.holds(t, moved, i, byte(pages-50+i+1))
	}
	s.noErrors(t)
}

// Populate includes the children that the process has forked, and Graduate, too.
func TestPopulateChild(t *testing.T) {
	uffdtest.RequireRoot(t)
	const pages = 200
	for name, populate := range map[string]func(*pager.Client) error{
		"populate": func(c *pager.Client) error { return c.Populate(t.Context(), nil) },
		"graduate": func(c *pager.Client) error { return c.Graduate(t.Context(), nil) },
	} {
		t.Run(name, func(t *testing.T) {
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, pages)
			s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, source.FromBytes(image(uffdtest.Anon, pages))))
			at := uint64(mem.Page(pages - 1).Start)
			child := s.Fork(uffdtest.Step{Op: uffdtest.StepGate},
				uffdtest.Step{Op: uffdtest.StepPagemap, Args: [6]uint64{at}},
				uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{at}})
			eventually(t, "the child is known", func() bool { return s.client.Stats().Forks == 1 })
			if err := populate(s.client); err != nil {
				t.Fatal(err)
			}
			if n := s.client.Stats().Populated; n != 2*pages {
				t.Errorf("%d pages populated, want %d", n, 2*pages)
			}
			s.OpenGate()
			got, err := child.Result()
			if err != nil {
				t.Fatal(err)
			}
			if got[2]&uffdtest.PagemapPresent == 0 || got[3] != pages {
				t.Errorf("the child's page: %#x, holds %d", got[2], got[3])
			}
			s.noErrors(t)
		})
	}
}

// A child that is gone, although nobody has noticed yet, does not bring shared
// memory back which its parent has discarded since.
func TestPopulateGoneChild(t *testing.T) {
	uffdtest.RequireEventFork(t)
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	const pages = 8
	proc := uffdtest.Start(t)
	mem := proc.Map(uffdtest.Shmem, pages)
	f := proc.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
	r := region(mem, source.FromBytes(image(mem.Kind, pages)))
	r.Memory = attachMemory(t, proc, mem)
	s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, r)
	if _, err := s.Fork(uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{uint64(mem.Start)}}).Result(); err != nil {
		t.Fatal(err)
	}
	s.Madvise(mem.Page(1), unix.MADV_REMOVE).Value()
	s.Madvise(mem.Page(3), unix.MADV_REMOVE).Value()
	if err := s.client.Populate(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for i, b := range []byte{1, 0, 3, 0, 5, 6, 7, 8} {
		s.holds(t, mem, i, b)
	}
	s.noErrors(t)
}

// What a process that has graduated writes to memory that it had discarded stays,
// while a child is populated, or found to be gone.
func TestGraduateShared(t *testing.T) {
	uffdtest.RequireEventFork(t)
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	for _, dies := range []bool{false, true} {
		t.Run(map[bool]string{false: "lives", true: "gone"}[dies], func(t *testing.T) {
			const pages = 4
			proc := uffdtest.Start(t)
			mem := proc.Map(uffdtest.Shmem, pages)
			f := proc.Open(events)
			register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
			gate := make(chan struct{})
			r := region(mem, slow{source.FromBytes(image(mem.Kind, pages)), map[int64]chan struct{}{int64(pageSize): gate}})
			r.Memory = attachMemory(t, proc, mem)
			s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, r)
			child := s.Fork(uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{uint64(mem.Start)}}, uffdtest.Step{Op: uffdtest.StepGate})
			eventually(t, "the child has loaded", func() bool { return r.Memory[0] == 1 })
			s.Madvise(mem.Page(1), unix.MADV_REMOVE).Value()
			graduated := make(chan error, 1)
			go func() { graduated <- s.client.Graduate(t.Context(), nil) }()
			// 1 by the child, 2 and 3 by its parent, then the child's.
			eventually(t, "the child is populated", func() bool { return s.client.Stats().Reads >= 4 })
			store := s.Store(mem.Page(1).Start, 7)
			store.Value()
			if dies {
				s.OpenGate()
				child.Result()
			}
			close(gate)
			if err := <-graduated; err != nil {
				t.Log(err)
			}
			if b := s.Load(mem.Page(1).Start).Value(); b != 7 {
				t.Errorf("the page holds %d, 7 was written", b)
			}
			if !dies {
				s.OpenGate()
				child.Result()
			}
		})
	}
}
