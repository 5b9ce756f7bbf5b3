package pager_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// Threads that wait for a page that has failed are let go when the page is
// discarded, unmapped or moved away.
func TestHeldPageChanges(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(s *served, page uffd.Range)
		err    error
	}{
		{"discard", func(s *served, page uffd.Range) { s.Madvise(page, unix.MADV_DONTNEED).Value() }, nil},
		{"unmap", func(s *served, page uffd.Range) { s.Munmap(page).Value() }, uffdtest.ErrSigbus},
		{"move", func(s *served, page uffd.Range) {
			to := s.Map(uffdtest.Anon, 1)
			s.Mremap(page, page.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to.Start).Value()
		}, uffdtest.ErrSigbus},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, 3)
			s := serve(t, proc, f, &pager.Pager{RetryFor: -1, OnFailure: pager.Hold, FaultAround: 1}, region(mem,
				failing{source.FromBytes(image(uffdtest.Anon, 3)), func(off int64) error {
					if off == int64(pageSize) {
						return errInjected
					}
					return nil
				}}))
			load := s.Load(mem.Page(1).Start)
			eventually(t, "the failure is reported", func() bool { return len(s.reports()) == 1 })
			test.change(s, mem.Page(1))
			if b, err := load.Result(); err != test.err || err == nil && b[0] != 0 {
				t.Errorf("the access ended with %v, %v; want 0, %v", b, err, test.err)
			}
			s.holds(t, mem, 2, 3)
		})
	}
}

// A fault that is read together with the event that unmaps its page is let go, and
// is no failure.
func TestUnmapOvertakesFault(t *testing.T) {
	for _, action := range []pager.Failure{pager.Poison, pager.Hold, pager.Zeros} {
		proc := uffdtest.Start(t)
		mem, f := mapped(t, proc, uffdtest.Anon, 3)
		calls := make(chan *uffdtest.Call, 2)
		first := true // the loop's
		contents := hooked{source.FromBytes(image(uffdtest.Anon, 3)), func(int) {
			if !first {
				return
			}
			first = false
			calls <- proc.Load(mem.Page(1).Start)
			elsewhere(t, "the fault waits", func() bool { unread, _ := waitingFaults(t, f); return unread == 1 })
			calls <- proc.Munmap(mem.Page(1))
			elsewhere(t, "the page is gone", func() bool { return !isMapped(t, proc.Pid, mem.Page(1).Start) })
		}}
		s := serve(t, proc, f, &pager.Pager{FaultAround: 1, OnFailure: action}, region(mem, contents))
		s.holds(t, mem, 0, 1)
		if b, err := (<-calls).Result(); err != uffdtest.ErrSigbus { // SIGSEGV in fact
			t.Errorf("%d: the access ended with %v, %v; want a signal", action, b, err)
		}
		(<-calls).Value()
		s.holds(t, mem, 2, 3)
		s.noErrors(t)
	}
}

// Memory outside of all regions that is protected, or that the file has, is no
// place where threads ask for ever.
func TestUnknownIsThere(t *testing.T) {
	for _, p := range []*pager.Pager{{UnknownZero: true}, {OnFailure: pager.Hold}} {
		t.Run("protected", func(t *testing.T) {
			uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
			proc := uffdtest.Start(t)
			mem := proc.Map(uffdtest.Anon, 2)
			f := proc.Open(events)
			register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterWP)
			if _, err := f.Copy(mem.Page(1).Start, image(uffdtest.Anon, 2)[pageSize:], uffd.CopyWP); err != nil {
				t.Fatal(err)
			}
			known := mem
			known.Len = uint64(pageSize)
			s := serve(t, proc, f, p, region(known, source.FromBytes(image(uffdtest.Anon, 1))))
			s.Store(mem.Page(1).Start+1, 7).Value()
			if b := s.Load(mem.Page(1).Start).Value(); b != 2 {
				t.Errorf("loaded %d, want 2", b)
			}
			s.noErrors(t)
		})
	}
	t.Run("shared", func(t *testing.T) {
		uffdtest.Require(t, uffd.FeatureMinorShmem)
		proc := uffdtest.Start(t)
		mem := proc.Map(uffdtest.Shmem, 2)
		f := proc.Open(events)
		register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
		attachMemory(t, proc, mem)[pageSize] = 9
		known := mem
		known.Len = uint64(pageSize)
		s := serve(t, proc, f, &pager.Pager{UnknownZero: true}, region(known, source.FromBytes(image(uffdtest.Shmem, 1))))
		if b := s.Load(mem.Page(1).Start).Value(); b != 9 {
			t.Errorf("loaded %d, want 9", b)
		}
		s.noErrors(t)
	})
}

// isMapped reports whether a process has memory at a.
func isMapped(t testing.TB, pid int, a uffd.Addr) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(maps)) {
		var start, end uffd.Addr
		if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
			t.Errorf("%q: %v", line, err)
		}
		if start <= a && a < end {
			return true
		}
	}
	return false
}

// A Borrower that breaks its word costs speed: its bytes are read.
type stingy struct {
	source.Borrower
	lend func(p []byte, use func([]byte) error) error
}

func TestBrokenBorrower(t *testing.T) {
	for name, lend := range map[string]func([]byte, func([]byte) error) error{
		"nothing":    func([]byte, func([]byte) error) error { return nil },
		"too little": func(p []byte, use func([]byte) error) error { return use(p[:len(p)-1]) },
		"too much":   func(p []byte, use func([]byte) error) error { return use(append(p, 0)) },
	} {
		t.Run(name, func(t *testing.T) {
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, 2)
			s := serve(t, proc, f, new(pager.Pager), region(mem, stingy{source.FromBytes(image(uffdtest.Anon, 2)), lend}))
			s.holds(t, mem, 0, 1)
			s.holds(t, mem, 1, 2)
			s.noErrors(t)
		})
	}
}

// Mappings that end within what is read together are no failure.
func TestPopulateSplitMapping(t *testing.T) {
	const pages = 8
	for _, from := range []string{"lent", "read"} {
		t.Run(from, func(t *testing.T) {
			var contents source.Source = source.FromBytes(image(uffdtest.Anon, pages))
			if from == "read" {
				contents = slow{contents, nil}
			}
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, pages)
			s := serve(t, proc, f, new(pager.Pager), region(mem, contents))
			s.Mprotect(mem.Page(3), unix.PROT_READ).Value()
			if err := s.client.Populate(t.Context(), nil); err != nil {
				t.Errorf("Populate: %v", err)
			}
			missing := s.client.Stats().Missing
			for i := range pages {
				s.holds(t, mem, i, byte(i+1))
			}
			if n := s.client.Stats().Missing - missing; n != 0 {
				t.Errorf("%d faults after Populate", n)
			}
			s.noErrors(t)
		})
	}
}

// The same for a fault: it costs one read of the source.
func TestFaultSplitMapping(t *testing.T) {
	const pages = 64
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, pages)
	p := &pager.Pager{FaultAround: 16 * pageSize}
	s := serve(t, proc, f, p, region(mem, slow{source.FromBytes(image(uffdtest.Anon, pages)), nil}))
	for i := 4; i < pages; i += 8 {
		s.Mprotect(uffd.Range{Start: mem.Page(i).Start, Len: 4 * uint64(pageSize)}, unix.PROT_READ).Value()
	}
	for i := range pages {
		reads := s.client.Stats().Reads
		s.holds(t, mem, i, byte(i+1))
		if n := s.client.Stats().Reads - reads; n > 1 {
			t.Errorf("page %d: %d reads", i, n)
		}
	}
	s.noErrors(t)
}

// Parent and child have the same shared memory: what one of them has written is
// not taken back by what the source has, when the other one asks for the page. A
// page that one of them discards reads zeros for both.
func TestForkShared(t *testing.T) {
	uffdtest.RequireEventFork(t)
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	const pages = 5 // the child says with the last one how far it is
	proc := uffdtest.Start(t)
	mem := proc.Map(uffdtest.Shmem, pages)
	f := proc.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
	r := region(mem, source.FromBytes(image(uffdtest.Shmem, pages)))
	r.Memory = attachMemory(t, proc, mem)
	s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, r)
	load := func(i int) uffdtest.Step {
		return uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{uint64(mem.Page(i).Start)}}
	}
	child := s.Fork(load(3), uffdtest.Step{Op: uffdtest.StepStore, Args: [6]uint64{uint64(mem.Page(4).Start), 7}},
		uffdtest.Step{Op: uffdtest.StepGate}, load(0), load(1), load(2), load(3))
	t.Cleanup(proc.OpenGate)
	elsewhere(t, "the child has loaded", func() bool { return r.Memory[4*pageSize] == 7 })
	s.Fill(mem.Page(0), 9).Value()
	s.holds(t, mem, 1, 2)
	s.Madvise(mem.Page(3), unix.MADV_REMOVE).Value()
	s.OpenGate()
	got, err := child.Result()
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		at   int
		want uint64
	}{{0, 4}, {3, 9}, {4, 2}, {5, 3}, {6, 0}} {
		if v := got[1+step.at]; v != step.want {
			t.Errorf("step %d: the child has %d, want %d", step.at, v, step.want)
		}
	}
	for i, b := range []byte{9, 2, 3, 0} {
		s.holds(t, mem, i, b)
	}
	s.noErrors(t)
}

// A page that leaves the file of shared memory after a thread has asked for it is
// discarded, and no failure.
func TestMinorOvertaken(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	proc := uffdtest.Start(t)
	mem := proc.Map(uffdtest.Shmem, 2)
	f := proc.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
	r := region(mem, nil)
	r.Memory = attachMemory(t, proc, mem)
	calls := make(chan *uffdtest.Call, 1)
	r.Source = hooked{source.FromBytes(image(uffdtest.Shmem, 2)), func(page int) {
		if page != 0 {
			return
		}
		calls <- proc.Load(mem.Page(1).Start)
		elsewhere(t, "the fault waits", func() bool { unread, _ := waitingFaults(t, f); return unread == 1 })
		if err := unix.Madvise(r.Memory[pageSize:], unix.MADV_REMOVE); err != nil {
			t.Error(err)
		}
	}}
	s := serve(t, proc, f, &pager.Pager{FaultAround: 1, RetryFor: -1}, r)
	s.holds(t, mem, 1, 2)
	s.Madvise(mem.Page(1), unix.MADV_DONTNEED).Value() // of the mapping, not of the file
	s.holds(t, mem, 0, 1)
	if b := (<-calls).Value(); b != 0 {
		t.Errorf("loaded %d, want 0", b)
	}
	s.noErrors(t)
}

// When a part of a huge page is discarded, the rest keeps what the source has.
func TestRemovePartOfPage(t *testing.T) {
	const pages = 3
	uffdtest.LockSettings(t).HugePages(pages)
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Hugetlb, pages)
	s := serve(t, proc, f, new(pager.Pager), region(mem, source.FromBytes(image(uffdtest.Hugetlb, pages))))
	s.holds(t, mem, 0, 1)
	part := uint64(pageSize)
	s.Madvise(uffd.Range{Start: mem.Page(1).Start - uffd.Addr(part), Len: mem.Page(1).Len + 2*part}, unix.MADV_REMOVE).Value()
	for i, want := range []byte{1, 0, 3} {
		rest := mem.Page(i)
		switch i {
		case 0:
			rest.Len -= part
		case 2:
			rest = rest.Skip(int64(part))
		}
		if n := s.Check(rest, want).Value(); n != 0 {
			t.Errorf("page %d: %d bytes are not %d", i, n, want)
		}
	}
	// Old kernels (5.10) leave a part of a huge page in memory as it is.
	major, _ := uffdtest.Kernel()
	if b := s.Load(mem.Page(1).Start - 1).Value(); b != 0 && (major >= 6 || b != 1) {
		t.Errorf("the part of a page that was there holds %d", b)
	}
	s.noErrors(t)
}
