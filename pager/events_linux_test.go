package pager_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// Discarded pages read zeros, whether they were there before or not, and not the
// contents of the source.
func TestRemovedReadsZeros(t *testing.T) {
	for _, kind := range []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem, uffdtest.HugetlbPrivate} {
		t.Run(kind.String(), func(t *testing.T) {
			if kind.Huge() {
				uffdtest.RequireKernel(t, 5, 18, "MADV_DONTNEED of hugetlb memory")
				uffdtest.LockSettings(t).HugePages(5)
			}
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, kind, 4)
			s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, source.FromBytes(image(kind, 4))))
			s.holds(t, mem, 0, 1)
			advice := unix.MADV_DONTNEED
			if kind.Shared() {
				advice = unix.MADV_REMOVE
			}
			discarded := uffd.Range{Start: mem.Start, Len: 2 * mem.Page(0).Len} // one touched, one not
			s.Madvise(discarded, advice).Value()
			for i, b := range []byte{0, 0, 3, 4} {
				s.holds(t, mem, i, b)
			}
			s.Fill(mem.Page(0), 9).Value()
			s.holds(t, mem, 0, 9)
			s.Madvise(mem.Range, advice).Value()
			for i := range 4 {
				s.holds(t, mem, i, 0)
			}
			s.noErrors(t)
		})
	}
}

// A fault that was read before the REMOVE of its page is not filled with what the
// page had: while the source is read, the page is discarded.
func TestRemoveOvertakesRead(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 2)
	gate := make(chan struct{})
	s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, slow{
		source.FromBytes(image(uffdtest.Anon, 2)), map[int64]chan struct{}{0: gate}}))
	load := s.Load(mem.Start)
	eventually(t, "the source is read", func() bool { return s.client.Stats().Reads == 1 })
	s.Madvise(mem.Page(0), unix.MADV_DONTNEED).Value() // does not wait for the worker
	if b := load.Value(); b != 0 {
		t.Errorf("loaded %d, want 0", b)
	}
	close(gate)
	s.holds(t, mem, 1, 2)
	s.holds(t, mem, 0, 0)
	if n := s.client.Stats().Discarded; n != 1 {
		t.Errorf("%d pages discarded, want 1", n)
	}
}

// Fills that the kernel refuses because an event is under way are done after it.
// Threads load pages while others discard their neighbours.
func TestRemoveRace(t *testing.T) {
	const pages, rounds = 8, 300
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for _, from := range []string{"lent", "read"} {
		t.Run(from, func(t *testing.T) {
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, pages)
			var contents source.Source = source.FromBytes(image(uffdtest.Anon, pages))
			if from == "read" {
				contents = slow{contents, nil}
			}
			s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, contents))
			discarded := make([]bool, pages)
			for range rounds {
				i, j := random.IntN(pages), random.IntN(pages)
				load, remove := s.Load(mem.Page(i).Start), s.Madvise(mem.Page(j), unix.MADV_DONTNEED)
				b := load.Value()
				remove.Value()
				want := byte(i + 1)
				if discarded[i] {
					want = 0
				}
				if byte(b) != want && (i != j || b != 0) {
					t.Fatalf("page %d: loaded %d, want %d; page %d was being discarded", i, b, want, j)
				}
				discarded[j] = true
				s.holds(t, mem, j, 0)
			}
			s.noErrors(t)
		})
	}
}

// hooked lends its bytes after a hook that runs in the pager's loop: what it waits
// for happens before the pager reads on.
type hooked struct {
	source.Borrower
	before func(page int)
}

func (s hooked) Borrow(off int64, n int, use func([]byte) error) error {
	s.before(int(off) / pageSize)
	return s.Borrower.Borrow(off, n, use)
}

// A fill is refused because of an event that nobody has read yet: it has to be
// read before the fill is tried again.
func TestRemoveDuringFill(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 2)
	removes := make(chan *uffdtest.Call, 1)
	begin := sync.OnceFunc(func() {
		removes <- proc.Madvise(mem.Page(1), unix.MADV_DONTNEED)
		elsewhere(t, "the event waits", func() bool { return waits(t, f) })
	})
	contents := hooked{source.FromBytes(image(uffdtest.Anon, 2)), func(int) { begin() }}
	s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, contents))
	s.holds(t, mem, 0, 1)
	(<-removes).Value()
	s.holds(t, mem, 1, 0)
	eventually(t, "the refusal is counted", func() bool { return s.client.Stats().Deferred > 0 })
	s.noErrors(t)
}

// The kernel delivers faults before the events that it delivers together with
// them. What a fault asks for must not come back after its page was discarded.
func TestRemoveOvertakesFault(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 3)
	var remove *uffdtest.Call // the loop's
	calls := make(chan *uffdtest.Call, 2)
	contents := hooked{source.FromBytes(image(uffdtest.Anon, 3)), func(page int) {
		switch {
		case remove == nil:
			remove = proc.Madvise(mem.Page(1), unix.MADV_DONTNEED)
			elsewhere(t, "the event waits", func() bool { return waits(t, f) })
			calls <- proc.Load(mem.Page(1).Start)
			calls <- remove
			elsewhere(t, "the fault waits, too", func() bool { unread, _ := waitingFaults(t, f); return unread == 1 })
		case page == 1: // what must not be: see it through
			elsewhere(t, "the page is discarded", remove.Done)
		}
	}}
	s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, contents))
	s.holds(t, mem, 0, 1)
	if b := (<-calls).Value(); b != 0 {
		t.Errorf("loaded %d, want 0", b)
	}
	(<-calls).Value()
	s.holds(t, mem, 1, 0)
	s.holds(t, mem, 2, 3)
	s.noErrors(t)
}

// waitingFaults returns how many faults of f nobody has read, and how many threads
// wait in all.
func waitingFaults(t testing.TB, f *uffd.File) (unread, waiting int) {
	t.Helper()
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info []byte
	conn.Control(func(fd uintptr) { info, err = os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd)) })
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(info), "\npending:")
	if _, err := fmt.Sscanf(rest, "%d\ntotal:%d", &unread, &waiting); err != nil {
		t.Fatalf("fdinfo is %q: %v", info, err)
	}
	return unread, waiting
}

// Memory that is moved takes its contents and its history along; what stays
// behind with MREMAP_DONTUNMAP reads zeros.
func TestRemap(t *testing.T) {
	for _, test := range []struct {
		name string
		keep bool
	}{{"move", false}, {"dontunmap", true}} {
		t.Run(test.name, func(t *testing.T) {
			if test.keep {
				uffdtest.RequireKernel(t, 5, 7, "MREMAP_DONTUNMAP")
			}
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, 6)
			s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, source.FromBytes(image(uffdtest.Anon, 6))))
			s.holds(t, mem, 0, 1)
			s.Madvise(mem.Page(2), unix.MADV_DONTNEED).Value()
			// Pages 1 to 4 of 0 to 5 move: 1 touched, 2 discarded, 3 and 4 missing.
			s.holds(t, mem, 1, 2)
			middle := uffd.Range{Start: mem.Page(1).Start, Len: 4 * mem.Page(0).Len}
			flags := unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED
			if test.keep {
				flags = unix.MREMAP_MAYMOVE | unix.MREMAP_DONTUNMAP
			}
			var target uffd.Addr
			if !test.keep {
				target = s.Map(uffdtest.Anon, 4).Start
			}
			moved := mem
			moved.Start = uffd.Addr(s.Mremap(middle, middle.Len, flags, target).Value())
			moved.Len = middle.Len
			for i, b := range []byte{2, 0, 4, 5} {
				s.holds(t, moved, i, b)
			}
			s.holds(t, mem, 0, 1)
			s.holds(t, mem, 5, 6)
			if test.keep {
				for i := 1; i < 5; i++ {
					s.holds(t, mem, i, 0)
				}
			}
			s.noErrors(t)
		})
	}
}

// Shared memory that stays behind with MREMAP_DONTUNMAP still shows its file.
func TestRemapShared(t *testing.T) {
	uffdtest.RequireKernel(t, 5, 13, "MREMAP_DONTUNMAP of shared memory")
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	proc := uffdtest.Start(t)
	mem := proc.Map(uffdtest.Shmem, 4)
	f := proc.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
	r := region(mem, source.FromBytes(image(uffdtest.Shmem, 4)))
	r.Memory = attachMemory(t, proc, mem)
	s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, r)
	s.holds(t, mem, 0, 1)
	s.holds(t, mem, 1, 2)
	s.Fill(mem.Page(0), 9).Value()
	moved := mem
	moved.Start = uffd.Addr(s.Mremap(mem.Range, mem.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_DONTUNMAP, 0).Value())
	s.holds(t, moved, 0, 9)
	s.holds(t, mem, 2, 3) // the other place first
	for i, b := range []byte{9, 2, 3, 4} {
		s.holds(t, mem, i, b)
		s.holds(t, moved, i, b)
	}
	s.noErrors(t)
}

// While a page of shared memory is read for one place where it is mapped, a thread
// asks for it at the other one, and gets it, too; or it is discarded there, and reads
// zeros at both.
func TestRemapSharedReads(t *testing.T) {
	uffdtest.RequireKernel(t, 5, 13, "MREMAP_DONTUNMAP of shared memory")
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	const pages = 4
	for _, discard := range []bool{false, true} {
		t.Run(map[bool]string{false: "both", true: "discarded"}[discard], func(t *testing.T) {
			proc := uffdtest.Start(t)
			mem := proc.Map(uffdtest.Shmem, pages)
			f := proc.Open(events)
			register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
			gate := make(chan struct{})
			r := region(mem, slow{source.FromBytes(image(mem.Kind, pages)), map[int64]chan struct{}{0: gate}})
			r.Memory = attachMemory(t, proc, mem)
			s := serve(t, proc, f, new(pager.Pager), r)
			moved := mem
			moved.Start = uffd.Addr(s.Mremap(mem.Range, mem.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_DONTUNMAP, 0).Value())
			populated := make(chan error, 1)
			go func() { populated <- s.client.Populate(t.Context(), nil, moved.Range) }()
			eventually(t, "the source is read", func() bool { return s.client.Stats().Reads == 1 })
			loads := []*uffdtest.Call{s.Load(moved.Page(1).Start)}
			if !discard {
				loads = append(loads, s.Load(mem.Page(1).Start))
			}
			eventually(t, "all faults are read", func() bool {
				unread, waiting := waitingFaults(t, f)
				return unread == 0 && waiting == len(loads)
			})
			want := uint64(2)
			if discard {
				s.Madvise(mem.Page(1), unix.MADV_REMOVE).Value()
				want = 0
			}
			close(gate)
			for _, load := range loads {
				if b := load.Value(); b != want {
					t.Errorf("loaded %d, want %d", b, want)
				}
			}
			if err := <-populated; err != nil {
				t.Error(err)
			}
			for i, b := range []byte{1, byte(want), 3, 4} {
				s.holds(t, mem, i, b)
				s.holds(t, moved, i, b)
			}
			s.noErrors(t)
		})
	}
}

// Memory that has grown reads zeros, in place and after a move, if the pager is
// told so.
func TestGrow(t *testing.T) {
	proc := uffdtest.Start(t)
	mem := proc.Map(uffdtest.Anon, 8)
	proc.Munmap(uffd.Range{Start: mem.Page(2).Start, Len: 6 * uint64(pageSize)}).Value() // room
	mem.Len = 2 * uint64(pageSize)
	f := proc.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing)
	s := serve(t, proc, f, &pager.Pager{UnknownZero: true}, region(mem, source.FromBytes(image(uffdtest.Anon, 8))))
	for _, pages := range []uint64{4, 1000} {
		mem.Start = uffd.Addr(s.Mremap(mem.Range, pages*uint64(pageSize), unix.MREMAP_MAYMOVE, 0).Value())
		mem.Len = pages * uint64(pageSize)
		s.holds(t, mem, 0, 1)
		s.holds(t, mem, 1, 2)
		for _, i := range []int{2, 3, int(pages) - 1} {
			s.holds(t, mem, i, 0)
		}
	}
	s.noErrors(t)
}

// A fault outside of all regions is reported.
func TestUnknownFault(t *testing.T) {
	uffdtest.Require(t, uffd.FeaturePoison)
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 2)
	known := mem
	known.Len = uint64(pageSize)
	s := serve(t, proc, f, new(pager.Pager), region(known, source.FromBytes(image(uffdtest.Anon, 2))))
	if _, err := s.Load(mem.Page(1).Start).Result(); err != uffdtest.ErrSigbus {
		t.Errorf("the access ended with %v, want a signal", err)
	}
	s.holds(t, mem, 0, 1)
	eventually(t, "the fault is reported", func() bool { return len(s.reports()) == 1 })
	var e *pager.PageError
	if err := s.reports()[0]; !errors.As(err, &e) || e.Page != mem.Page(1) || e.Action != pager.Poison {
		t.Errorf("reported %v", err)
	}
}

// A thread that waits for memory which is unmapped, or mapped anew, is let go.
func TestUnmap(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 4)
	gate := make(chan struct{})
	s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, slow{
		source.FromBytes(image(uffdtest.Anon, 4)), map[int64]chan struct{}{int64(pageSize): gate}}))
	load := s.Load(mem.Page(1).Start)
	eventually(t, "the source is read", func() bool { return s.client.Stats().Reads == 1 })
	s.Munmap(mem.Page(1)).Value()
	if _, err := load.Result(); err != uffdtest.ErrSigbus { // SIGSEGV in fact
		t.Errorf("the access ended with %v, want a signal", err)
	}
	close(gate)
	s.Mmap(mem.Page(1).Start, uint64(pageSize), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED, -1)
	for i, b := range []byte{1, 0, 3, 4} {
		s.holds(t, mem, i, b)
	}
	s.noErrors(t)
}

// Forked children have what their parent had, and everybody's descriptors are
// closed at the end.
func TestFork(t *testing.T) {
	uffdtest.RequireRoot(t)
	before := descriptors(t)
	t.Run("", func(t *testing.T) {
		proc := uffdtest.Start(t)
		mem, f := mapped(t, proc, uffdtest.Anon, 5)
		s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, region(mem, source.FromBytes(image(uffdtest.Anon, 5))))
		s.Fill(mem.Page(0), 9).Value()
		s.Madvise(mem.Page(1), unix.MADV_DONTNEED).Value()
		at := func(i int) uint64 { return uint64(mem.Page(i).Start) }
		load := func(i int) uffdtest.Step { return uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{at(i)}} }
		const children = 4
		for n := range uint64(children) {
			child := s.Fork(load(0), load(1), load(2),
				uffdtest.Step{Op: uffdtest.StepMadvise, Args: [6]uint64{at(2), uint64(pageSize), unix.MADV_DONTNEED}}, load(2),
				uffdtest.Step{Op: uffdtest.StepGate}, load(3), load(4))
			eventually(t, "the child has discarded a page", func() bool { return s.client.Stats().Removes == 2+2*n })
			s.Madvise(mem.Page(3), unix.MADV_DONTNEED).Value() // after the fork: not the child's
			s.OpenGate()
			got, err := child.Result()
			if err != nil {
				t.Fatal(err)
			}
			want := []uint64{9, 0, 3, 0, 0, 0, 4, 5}
			if n > 0 { // the fork came after it
				want[6] = 0
			}
			for i := range want {
				if op := i + 1; i != 5 && got[op] != want[i] { // the gate returns what it read
					t.Errorf("child %d, step %d: got %d, want %d", n, i, got[op], want[i])
				}
			}
		}
		s.holds(t, mem, 2, 3)
		s.holds(t, mem, 3, 0)
		if n := s.client.Stats().Forks; n != children {
			t.Errorf("%d forks, want %d", n, children)
		}
		s.Kill()
		if err := s.end(t); err != nil {
			t.Errorf("Serve = %v, want nil", err)
		}
		s.noErrors(t)
	})
	eventually(t, "all descriptors are closed", func() bool { return descriptors(t) == before })
}

func descriptors(t testing.TB) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, file := range files {
		if name, _ := os.Readlink("/proc/self/fd/" + file.Name()); name == "anon_inode:[userfaultfd]" {
			n++
		}
	}
	return n
}

// attachMemory maps a process's shared memory here.
func attachMemory(t testing.TB, s *uffdtest.Process, mem uffdtest.Memory) []byte {
	t.Helper()
	fd, err := unix.PidfdOpen(s.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	file, err := unix.PidfdGetfd(fd, mem.FD, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(file)
	b, err := unix.Mmap(file, 0, int(mem.Len), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// Minor faults are served from shared memory that the pager fills, each page when
// it is ready and not before.
func TestMinor(t *testing.T) {
	const pages = 4
	for _, kind := range []uffdtest.Kind{uffdtest.Shmem, uffdtest.Hugetlb} {
		t.Run(kind.String(), func(t *testing.T) {
			uffdtest.Require(t, uffd.FeatureMinorShmem|uffd.FeatureMinorHugetlbfs)
			if kind.Huge() {
				uffdtest.LockSettings(t).HugePages(pages)
			}
			for name, contents := range sources(t, image(kind, pages)) {
				t.Run(name, func(t *testing.T) {
					proc := uffdtest.Start(t)
					mem := proc.Map(kind, pages)
					f := proc.Open(events)
					register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
					r := region(mem, contents)
					r.Memory = attachMemory(t, proc, mem)
					// The file has this page already, as a neighbour that came with a huge
					// page would: it is not ready.
					r.Memory[kind.PageSize()] = 0
					s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, r)
					for i := range pages {
						s.holds(t, mem, i, byte(i+1))
					}
					if kind == uffdtest.Shmem {
						// Gone from the mapping, not from the file.
						s.Fill(mem.Page(0), 9).Value()
						s.Madvise(mem.Page(0), unix.MADV_DONTNEED).Value()
						s.holds(t, mem, 0, 9)
						s.Madvise(mem.Page(0), unix.MADV_REMOVE).Value()
						s.holds(t, mem, 0, 0)
					}
					eventually(t, "all pages are counted as continued, and minor faults", func() bool {
						n := s.client.Stats() // threads go on before they are counted
						return n.Continued >= pages && n.Copied == 0 && n.Minor > 0
					})
					s.noErrors(t)
				})
			}
		})
	}
}

// No write goes through before BeforeWrite, also not on a page that exists
// already, in the window between its coming and its protection.
func TestBeforeWrite(t *testing.T) {
	for _, kind := range []uffdtest.Kind{uffdtest.Anon, uffdtest.Shmem, uffdtest.HugetlbPrivate} {
		t.Run(kind.String(), func(t *testing.T) {
			uffdtest.Require(t, uffd.FeaturePagefaultFlagWP|uffd.FeatureWPHugetlbfsShmem)
			const pages = 6
			if kind.Huge() {
				uffdtest.LockSettings(t).HugePages(pages + 1)
			}
			proc := uffdtest.Start(t)
			mem := proc.Map(kind, pages)
			f := proc.Open(events)
			register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterWP)
			var written [pages]atomic.Int32
			r := region(mem, source.FromBytes(image(kind, pages-1))) // the last page is zeros
			r.BeforeWrite = func(page uffd.Range) { written[uint64(page.Start-mem.Start)/mem.Page(0).Len].Add(1) }
			s := attach(t, proc, f, &pager.Pager{FaultAround: 1}, r)
			// This one is there, and unprotected.
			if _, err := f.Copy(mem.Page(4).Start, image(kind, 5)[4*kind.PageSize():], uffd.CopyDontWake); err != nil {
				t.Fatal(err)
			}
			s.start(t)
			if err := s.client.Populate(t.Context(), nil, mem.Page(4)); err != nil {
				t.Fatal(err)
			}
			s.holds(t, mem, 0, 1)
			for i := range pages {
				if n := written[i].Load(); n != 0 {
					t.Errorf("page %d: BeforeWrite before any write", i)
				}
			}
			for _, i := range []int{0, 1, 4, 5} {
				s.Store(mem.Page(i).Start, 77).Value()
				if n := written[i].Load(); n != 1 {
					t.Errorf("page %d: %d calls of BeforeWrite, want 1", i, n)
				}
				if b := s.Load(mem.Page(i).Start).Value(); b != 77 {
					t.Errorf("page %d: the write is lost", i)
				}
				s.Store(mem.Page(i).Start, 78).Value()
				if n := written[i].Load(); n != 1 {
					t.Errorf("page %d: BeforeWrite called for the second write", i)
				}
			}
			s.noErrors(t)
		})
	}
}

// withContinueWP came with ContinueWP (Linux 6.4), without which shared memory
// cannot be mapped protected.
const withContinueWP = uffd.FeatureWPUnpopulated

// A kernel that cannot map shared memory protected is found out before a thread
// waits.
func TestBeforeWriteOfMemory(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	proc := uffdtest.Start(t)
	mem := proc.Map(uffdtest.Shmem, 1)
	f := proc.Open(nil)
	r := region(mem, source.Zero(int64(mem.Len)))
	r.Memory = attachMemory(t, proc, mem)
	r.BeforeWrite = func(uffd.Range) {}
	offered, err := uffd.Probe()
	if err != nil {
		t.Fatal(err)
	}
	_, err = new(pager.Pager).Attach(f, r)
	switch {
	case offered.Has(withContinueWP) && err != nil:
		t.Error(err)
	case !offered.Has(withContinueWP) && !errors.Is(err, errors.ErrUnsupported):
		t.Errorf("Attach = %v, want ErrUnsupported", err)
	}
}

// Threads write to the same pages at the same time. When BeforeWrite is called for
// the first time, the page is as it came.
func TestNoWriteBefore(t *testing.T) {
	const pages, threads = 1000, 4
	for _, from := range []string{"bytes", "zeros", "shared"} {
		t.Run(from, func(t *testing.T) {
			uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
			kind, mode := uffdtest.Anon, uffd.RegisterMissing|uffd.RegisterWP
			if from == "shared" {
				uffdtest.Require(t, uffd.FeatureMinorShmem|uffd.FeatureWPHugetlbfsShmem|withContinueWP)
				kind, mode = uffdtest.Shmem, mode|uffd.RegisterMinor
			}
			contents := image(kind, pages)
			if from == "zeros" {
				clear(contents)
			}
			proc := uffdtest.Start(t)
			mem := proc.Map(kind, pages)
			f := proc.Open(events)
			register(t, f, mem.Range, mode)
			r := region(mem, source.FromBytes(contents))
			switch from {
			case "zeros":
				r.Source = source.Zero(int64(len(contents)))
			case "shared":
				r.Memory = attachMemory(t, proc, mem)
			}
			var called [pages]bool // in the loop
			var late int
			r.BeforeWrite = func(page uffd.Range) {
				i := int(page.Start-mem.Start) / pageSize
				if called[i] {
					return
				}
				called[i] = true
				now := make([]byte, pageSize)
				local := []unix.Iovec{{Base: &now[0]}}
				local[0].SetLen(len(now))
				remote := []unix.RemoteIovec{{Base: uintptr(page.Start), Len: len(now)}}
				if n, err := unix.ProcessVMReadv(proc.Pid, local, remote, 0); n != len(now) || err != nil {
					t.Errorf("reading page %d: %d bytes, %v", i, n, err)
				}
				if !bytes.Equal(now, contents[i*pageSize:][:pageSize]) {
					late++
				}
			}
			s := serve(t, proc, f, &pager.Pager{FaultAround: 1}, r)
			s.Run("write-together", uint64(mem.Start), pages, uint64(pageSize), threads).Value()
			if err := s.client.Close(); err != nil { // ends the loop
				t.Fatal(err)
			}
			if late > 0 {
				t.Errorf("%d pages had been written when BeforeWrite was called", late)
			}
			never := 0
			for _, yes := range called {
				if !yes {
					never++
				}
			}
			if never > 0 {
				t.Errorf("%d pages were written without BeforeWrite", never)
			}
			s.noErrors(t)
		})
	}
}

// "write-together" has threads write to each page, all in the same order, each a
// byte of its own.
var _ = uffdtest.Handle("write-together", func(args []uint64) ([]uint64, error) {
	start, pages, size, threads := args[0], args[1], args[2], args[3]
	var all sync.WaitGroup
	for w := range threads {
		all.Go(func() {
			random := rand.New(rand.NewPCG(w, 0))
			for i := range pages {
				for range random.IntN(3000) { // not quite at the same time
				}
				uffdtest.BytesAt(start+i*size+w*64, 1)[0] = ^byte(i+1) | 1
			}
		})
	}
	all.Wait()
	return nil, nil
})

// Protection leaves a mark where there is no page, and the kernel neither poisons
// it nor, in private memory, puts the zero page there. Threads do not ask for such
// a page for ever.
func TestProtectedBefore(t *testing.T) {
	uffdtest.Require(t, uffd.FeaturePoison|uffd.FeatureWPUnpopulated|uffd.FeatureWPHugetlbfsShmem)
	for _, kind := range uffdtest.Kinds {
		t.Run(kind.String(), func(t *testing.T) {
			const pages = 4
			if kind.Huge() {
				uffdtest.LockSettings(t).HugePages(pages + 1)
			}
			contents := failing{source.FromBytes(image(kind, pages)), func(off int64) error {
				if off/int64(kind.PageSize()) == 1 {
					return errInjected
				}
				return nil
			}}
			protected := func(t *testing.T, p *pager.Pager, change func(*pager.Region)) (*served, uffdtest.Memory) {
				proc := uffdtest.Start(t)
				mem := proc.Map(kind, pages)
				f := proc.Open(&uffd.Config{Require: uffd.FeatureWPUnpopulated, Prefer: pager.Events})
				register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterWP)
				if err := f.WriteProtect(mem.Range, uffd.WriteProtectWP); err != nil {
					t.Fatal(err)
				}
				r := region(mem, contents)
				change(&r)
				return serve(t, proc, f, p, r), mem
			}
			t.Run("poison", func(t *testing.T) {
				var written atomic.Int32
				s, mem := protected(t, &pager.Pager{RetryFor: -1, FaultAround: 1}, func(r *pager.Region) {
					r.BeforeWrite = func(uffd.Range) { written.Add(1) }
				})
				s.holds(t, mem, 0, 1)
				for range 2 {
					if _, err := s.Load(mem.Page(1).Start).Result(); err != uffdtest.ErrSigbus {
						t.Errorf("the access ended with %v, want a signal", err)
					}
				}
				eventually(t, "the page is counted", func() bool { return s.client.Stats().Poisoned == 1 })
				s.Store(mem.Page(2).Start, 77).Value()
				if n := written.Load(); n != 1 {
					t.Errorf("%d calls of BeforeWrite, want 1", n)
				}
				if n := len(s.reports()); n != 1 {
					t.Errorf("reported %v", s.reports())
				}
			})
			outside := func(t *testing.T) {
				s, mem := protected(t, new(pager.Pager), func(r *pager.Region) { r.Range.Len = uint64(pageSize) })
				if _, err := s.Load(mem.Page(1).Start).Result(); err != uffdtest.ErrSigbus {
					t.Errorf("the access ended with %v, want a signal", err)
				}
				s, mem = protected(t, &pager.Pager{UnknownZero: true}, func(r *pager.Region) { r.Range.Len = uint64(pageSize) })
				s.holds(t, mem, 1, 0)
			}
			if !kind.Huge() { // what lies outside is taken for pages of the system's size
				t.Run("outside", outside)
			}
			t.Run("zeros", func(t *testing.T) { // somebody else has protected it
				s, mem := protected(t, new(pager.Pager), func(r *pager.Region) { r.Source = source.Zero(1 << 40) })
				for i := range pages {
					s.holds(t, mem, i, 0)
				}
				if kind != uffdtest.Anon && kind != uffdtest.ShmemPrivate { // the kernel takes the mark away
					return
				}
				s.Store(mem.Page(2).Start, 7).Value()
				eventually(t, "the page is still protected", func() bool { return s.client.Stats().WriteProtected > 0 })
				s.noErrors(t)
			})
		})
	}
}

// Zeros do not take the place of poison: nobody has asked for that page.
func TestZerosNextToPoison(t *testing.T) {
	uffdtest.Require(t, uffd.FeaturePoison)
	for _, mode := range []uffd.RegisterMode{uffd.RegisterMissing, uffd.RegisterMissing | uffd.RegisterWP} {
		if mode.Has(uffd.RegisterWP) {
			uffdtest.Require(t, uffd.FeaturePagefaultFlagWP)
		}
		for name, reach := range map[string]func(*served, uffdtest.Memory){
			"Populate": func(s *served, mem uffdtest.Memory) {
				if err := s.client.Populate(t.Context(), nil); err != nil {
					t.Error(err)
				}
			},
			"fault-around": func(s *served, mem uffdtest.Memory) {
				for i := range 16 {
					if i != 5 {
						s.holds(t, mem, i, 0)
					}
				}
			},
		} {
			t.Run(mode.String()+"/"+name, func(t *testing.T) {
				proc := uffdtest.Start(t)
				mem := proc.Map(uffdtest.Anon, 16)
				f := proc.Open(events)
				register(t, f, mem.Range, mode)
				if _, err := f.Poison(mem.Page(5), 0); err != nil {
					t.Fatal(err)
				}
				s := serve(t, proc, f, &pager.Pager{FaultAround: 16 * pageSize}, region(mem, source.Zero(1<<40)))
				reach(s, mem)
				if v, err := s.Load(mem.Page(5).Start).Result(); err != uffdtest.ErrSigbus {
					t.Errorf("the poisoned page has %d, %v", v, err)
				}
				s.noErrors(t)
			})
		}
	}
}

// Threads that wait for a page which somebody else installs without waking them
// are woken.
func TestExistingPageWakes(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 16)
	s := attach(t, proc, f, new(pager.Pager), region(mem, source.FromBytes(image(uffdtest.Anon, 16))))
	load := s.Load(mem.Page(5).Start)
	eventually(t, "the fault waits", func() bool { return waits(t, f) })
	if _, err := f.Copy(mem.Page(5).Start, image(uffdtest.Anon, 99)[98*pageSize:], uffd.CopyDontWake); err != nil {
		t.Fatal(err)
	}
	s.start(t)
	if b := load.Value(); b != 99 {
		t.Errorf("loaded %d, want 99", b)
	}
	for i := range 16 {
		if i != 5 {
			s.holds(t, mem, i, byte(i+1))
		}
	}
	if n := s.client.Stats().Existed; n != 1 {
		t.Errorf("%d pages existed, want 1", n)
	}
}

// Threads that wait for different pages of what one fault brings in are all woken.
func TestNeighboursWake(t *testing.T) {
	const pages, first = 32, 16
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, pages)
	gate := make(chan struct{})
	s := serve(t, proc, f, new(pager.Pager), region(mem, slow{
		source.FromBytes(image(uffdtest.Anon, pages)), map[int64]chan struct{}{int64(first * pageSize): gate}}))
	var loads [pages]*uffdtest.Call
	loads[first] = s.Load(mem.Page(first).Start)
	eventually(t, "the source is read", func() bool { return s.client.Stats().Reads == 1 })
	for i := range pages {
		if i != first {
			loads[i] = s.Load(mem.Page(i).Start)
		}
	}
	eventually(t, "all faults are read", func() bool {
		n := 0
		for _, load := range loads {
			if load.Done() {
				n++
			}
		}
		unread, waiting := waitingFaults(t, f)
		return unread == 0 && waiting > 1 && n+waiting == pages
	})
	close(gate)
	for i, load := range loads {
		if b := load.Value(); b != uint64(i+1) {
			t.Errorf("page %d: loaded %d, want %d", i, b, i+1)
		}
	}
	s.noErrors(t)
}

// waits reports whether f has something to read.
func waits(t testing.TB, f *uffd.File) (yes bool) {
	t.Helper()
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	conn.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, _ := unix.Poll(fds, 0)
		yes = n > 0
	})
	return yes
}

// An empty pool of huge pages, which the kernel reports as a page that exists, is
// waited for, at a bounded rate, and reported.
func TestHugePoolEmpty(t *testing.T) {
	settings := uffdtest.LockSettings(t)
	settings.HugePages(1)
	proc := uffdtest.Start(t)
	length := uint64(uffdtest.HugePageSize())
	base := proc.Mmap(0, length, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_HUGETLB|unix.MAP_NORESERVE, -1)
	mem := uffdtest.Memory{Range: uffd.Range{Start: base, Len: length}, Kind: uffdtest.HugetlbPrivate}
	f := proc.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing)
	taken := proc.Map(uffdtest.Hugetlb, freeHugePages(t))
	proc.Fill(taken.Range, 1).Value()

	s := serve(t, proc, f, &pager.Pager{RetryFor: uffdtest.Patience}, region(mem, source.FromBytes(image(mem.Kind, 1))))
	load := s.Load(mem.Start)
	start := s.client.Stats().Missing
	time.Sleep(100 * time.Millisecond)
	if n := s.client.Stats().Missing - start; n > 1000 { // unbounded it is tens of thousands
		t.Errorf("%d faults in 100 ms for a page that cannot be had", n)
	}
	s.Madvise(taken.Range, unix.MADV_REMOVE).Value()
	if b := load.Value(); b != 1 {
		t.Errorf("loaded %d, want 1", b)
	}
}

func freeHugePages(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB/free_hugepages", uffdtest.HugePageSize()>>10))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
