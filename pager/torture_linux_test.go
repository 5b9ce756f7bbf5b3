package pager_test

import (
	"context"
	"flag"
	"math/rand/v2"
	"os"
	"runtime"
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

var (
	tortureTime = flag.Duration("torture", 2*time.Second, "how long TestTorture runs")
	tortureSeed = flag.Uint64("seed", 0, "of TestTorture; 0 takes a random one")
)

// erratic is a Source that is slow and fails now and then.
type erratic struct{ source.Source }

func (s erratic) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	switch rand.IntN(20) {
	case 0:
		return 0, errInjected
	case 1:
		time.Sleep(rand.N(3 * time.Millisecond))
	case 2:
		panic(errInjected)
	case 3:
		runtime.Goexit()
	}
	return s.Source.ReadAt(ctx, p, off)
}

// A modelPage is what the model knows of a page.
type modelPage struct {
	source  byte // what the source has
	holds   byte
	orZero  bool // or zeros: which of them depends on what nobody can know
	touched bool // so that the file of shared memory has it for certain
	clean   bool // not written since it was installed
}

// A victim is a thread with memory of its own and a model of what is there.
type victim struct {
	*uffdtest.Process
	random  *rand.Rand
	mem     uffdtest.Memory
	model   []modelPage
	checked *atomic.Uint64
	room    uffd.Range // to move to: no address is used twice
	forks   bool       // the pager can serve children
	memory  bool       // the region has Memory
	written *writes    // calls of BeforeWrite, if the region has that
}

// writes counts the calls of BeforeWrite for each page.
type writes struct {
	mu sync.Mutex
	n  map[uffd.Addr]int
}

func (w *writes) count(page uffd.Range) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n[page.Start]++
}

func (w *writes) of(page uffd.Range) int {
	if w == nil {
		return 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n[page.Start]
}

func newVictim(proc *uffdtest.Process, mem uffdtest.Memory, room uint64, seed uint64, checked *atomic.Uint64) *victim {
	v := &victim{Process: proc, mem: mem, checked: checked, random: rand.New(rand.NewPCG(seed, 0))}
	at := proc.Mmap(0, room, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE, -1)
	size := uint64(mem.Kind.PageSize())
	v.room = uffd.Range{Start: at, Len: room}.Skip(int64(-uint64(at) % size))
	return v
}

// expect adds the pages of a source, from page first on, to the model.
func (v *victim) expect(first int) {
	for i := range v.mem.Pages() {
		b := byte(1 + (first+i)%255)
		v.model = append(v.model, modelPage{source: b, holds: b, clean: true})
	}
}

func (v *victim) span() (first, n int, r uffd.Range) {
	first = v.random.IntN(len(v.model))
	n = 1 + v.random.IntN(min(8, len(v.model)-first))
	r = v.mem.Page(first)
	r.Len *= uint64(n)
	return first, n, r
}

// check compares page i of mem, which is where the victim has its memory or has
// had it, with the model. It reports false if there is a wrong byte.
func (v *victim) check(t testing.TB, mem uffdtest.Memory, i int) bool {
	page, p := mem.Page(i), &v.model[i]
	if p.orZero && v.Load(page.Start).Value() == 0 {
		p.holds = 0
	}
	p.orZero, p.touched = false, true
	if wrong := v.Check(page, p.holds).Value(); wrong != 0 {
		t.Errorf("page %d of %v: %d bytes are not %d but like %d; the source has %d", i, mem.Range, wrong, p.holds, v.Load(page.Start).Value(), p.source)
		return false
	}
	v.checked.Add(page.Len)
	return true
}

// step does one thing at random. It reports false if that showed a wrong byte.
func (v *victim) step(t testing.TB) bool {
	first, n, r := v.span()
	pages := v.model[first:][:n]
	switch op := v.random.IntN(100); {
	case op < 50:
		for i := range pages {
			if !v.check(t, v.mem, first+i) {
				return false
			}
		}
	case op < 65:
		return v.fill(t, first, n, byte(v.random.Uint32()))
	case op < 85:
		advice := v.advice(v.mem.Kind.Shared())
		v.Madvise(r, advice).Value()
		for i := range pages {
			switch p := &pages[i]; {
			case !v.mem.Kind.Shared() || advice == unix.MADV_REMOVE:
				*p = modelPage{source: p.source, clean: true}
			case !p.touched: // the kernel does not say that this was not MADV_REMOVE
				p.orZero = true
			}
		}
	case op < 91 && v.room.Len >= v.mem.Len:
		return v.move(t)
	case op < 93 && (len(v.model) > 8 || len(v.model) > 3 && v.mem.Kind.Huge()):
		last := v.mem.Page(len(v.model) - 1)
		v.Munmap(last).Value()
		v.mem.Len -= last.Len
		v.model = v.model[:len(v.model)-1]
	case op < 97 && v.forks:
		return v.fork(t, first, n, r)
	}
	return true
}

// advice returns how to discard memory.
func (v *victim) advice(remove bool) int {
	if remove && v.random.IntN(2) == 0 {
		return unix.MADV_REMOVE
	}
	return unix.MADV_DONTNEED
}

// fill writes b to n pages.
func (v *victim) fill(t testing.TB, first, n int, b byte) bool {
	before := make([]int, n)
	for i := range n {
		before[i] = v.written.of(v.mem.Page(first + i))
	}
	r := v.mem.Page(first)
	r.Len *= uint64(n)
	v.Fill(r, b).Value()
	for i := range n {
		page, p := v.mem.Page(first+i), &v.model[first+i]
		if v.written != nil && p.clean && v.written.of(page) == before[i] {
			t.Errorf("page %d of %v was written without BeforeWrite", first+i, v.mem.Range)
			return false
		}
		*p = modelPage{source: p.source, holds: b, touched: true}
	}
	return true
}

// move moves all memory. Now and then the old place stays mapped for a while:
// there private memory reads zeros, and shared memory shows its file.
func (v *victim) move(t testing.TB) bool {
	major, minor := uffdtest.Kernel()
	known := !v.mem.Kind.Shared() || v.memory
	keep := known && !v.mem.Kind.Huge() && (major > 5 || major == 5 && minor >= 13) && v.random.IntN(2) == 0
	flags := unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED
	if keep {
		flags |= unix.MREMAP_DONTUNMAP
	}
	old := v.mem
	v.mem.Start = uffd.Addr(v.Mremap(old.Range, old.Len, flags, v.room.Start).Value())
	v.room = v.room.Skip(int64(old.Len))
	if !keep {
		return true
	}
	defer func() { v.Munmap(old.Range).Value() }()
	if i := v.random.IntN(len(v.model)); v.mem.Kind.Shared() {
		return v.check(t, old, i)
	} else if wrong := v.Check(old.Page(i), 0).Value(); wrong != 0 {
		t.Errorf("page %d of %v, from where all has moved: %d bytes are not 0", i, old.Range, wrong)
		return false
	}
	return true
}

// fork has a child check a page, discard some, and write to another one.
func (v *victim) fork(t testing.TB, first, n int, r uffd.Range) bool {
	shared := v.mem.Kind.Shared()
	// Without Memory, the parent does not learn what the child has discarded.
	advice := v.advice(shared && v.memory)
	if v.model[first].orZero && !v.check(t, v.mem, first) {
		return false
	}
	page, holds := v.mem.Page(first), uint64(v.model[first].holds)
	discarded, then := r, uint64(0)
	if shared { // of the others nobody knows whether they were touched
		discarded = page
	}
	if shared && advice == unix.MADV_DONTNEED {
		then = holds
	}
	other := v.random.IntN(len(v.model))
	stored := v.mem.Page(other)
	results, err := v.Fork(
		uffdtest.Step{Op: uffdtest.StepCheck, Args: [6]uint64{uint64(page.Start), page.Len, holds}},
		uffdtest.Step{Op: uffdtest.StepMadvise, Args: [6]uint64{uint64(r.Start), r.Len, uint64(advice)}},
		uffdtest.Step{Op: uffdtest.StepCheck, Args: [6]uint64{uint64(discarded.Start), discarded.Len, then}},
		uffdtest.Step{Op: uffdtest.StepStore, Args: [6]uint64{uint64(stored.Start), 99}},
	).Result()
	if err != nil {
		t.Error(err)
		return false
	}
	if results[1] != 0 || results[2] != 0 || results[3] != 0 {
		t.Errorf("a child of %v: %d bytes of page %d are not %d, madvise gives %d, %d of %v are not %d then",
			v.mem.Range, results[1], first, holds, results[2], results[3], discarded, then)
		return false
	}
	v.checked.Add(page.Len + discarded.Len)
	if !shared {
		return true
	}
	v.model[first].touched = true
	for i := first; i < first+n; i++ {
		switch p := &v.model[i]; {
		case advice == unix.MADV_REMOVE && p.touched:
			p.holds, p.orZero, p.touched = 0, false, i == first
		case advice == unix.MADV_REMOVE || i == other && !p.touched:
			p.orZero = true
		}
	}
	if b := v.Load(stored.Start).Value(); b != 99 {
		t.Errorf("page %d of %v: a child has written 99, and there is %d", other, v.mem.Range, b)
		return false
	}
	v.Store(stored.Start, byte(v.Load(stored.Start+1).Value())).Value()
	v.model[other].clean = false
	return v.check(t, v.mem, other)
}

// A torture is a kind of client.
type torture struct {
	name                    string
	kind                    uffdtest.Kind
	needs                   uffd.Features
	mode                    uffd.RegisterMode
	memory                  bool // the regions have Memory
	clients, threads, pages int

	pager              pager.Pager
	contents           []byte
	checked, processes atomic.Uint64
}

// TestTorture has processes with several threads fault, write, discard, move,
// unmap, fork and exit at random, and compares all memory with what it should
// be.
func TestTorture(t *testing.T) {
	seed := *tortureSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	before := descriptors(t)
	kinds := []*torture{
		{name: "anon", kind: uffdtest.Anon, mode: uffd.RegisterMissing, clients: 2, threads: 4, pages: 64},
		{name: "anon, BeforeWrite", kind: uffdtest.Anon, needs: uffd.FeaturePagefaultFlagWP,
			mode: uffd.RegisterMissing | uffd.RegisterWP, clients: 1, threads: 4, pages: 64},
		{name: "shmem", kind: uffdtest.Shmem, needs: uffd.FeatureMissingShmem,
			mode: uffd.RegisterMissing, clients: 1, threads: 4, pages: 64},
		{name: "shmem, Memory", kind: uffdtest.Shmem, needs: uffd.FeatureMinorShmem, memory: true,
			mode: uffd.RegisterMissing | uffd.RegisterMinor, clients: 1, threads: 4, pages: 64},
		{name: "shmem, Memory, BeforeWrite", kind: uffdtest.Shmem, needs: uffd.FeatureMinorShmem | uffd.FeatureWPHugetlbfsShmem | withContinueWP, memory: true,
			mode: uffd.RegisterMissing | uffd.RegisterMinor | uffd.RegisterWP, clients: 1, threads: 4, pages: 64},
		{name: "hugetlb-private", kind: uffdtest.HugetlbPrivate, needs: uffd.FeatureMissingHugetlbfs,
			mode: uffd.RegisterMissing, clients: 1, threads: 2, pages: 6},
	}
	var all sync.WaitGroup
	for i, k := range kinds {
		if k.kind.Huge() && testing.Short() { // they are the whole system's
			continue
		}
		all.Go(func() { t.Run(k.name, func(t *testing.T) { k.run(t, rand.New(rand.NewPCG(seed, uint64(i)))) }) })
	}
	all.Wait()
	eventually(t, "all descriptors are closed", func() bool { return descriptors(t) == before })
	var failed, forks, remaps, unmaps uint64
	for _, k := range kinds {
		n := k.pager.Stats()
		failed, forks, remaps, unmaps = failed+n.ReadErrors, forks+n.Forks, remaps+n.Remaps, unmaps+n.Unmaps
	}
	if failed == 0 || forks == 0 && os.Geteuid() == 0 || remaps == 0 || unmaps == 0 {
		t.Error("something was not tried")
	}
}

func (k *torture) run(t *testing.T, random *rand.Rand) {
	uffdtest.Require(t, k.needs)
	if k.kind.Huge() {
		uffdtest.RequireKernel(t, 5, 18, "MADV_DONTNEED of hugetlb memory")
		// A child has a page that it reads, those that it discards, and one that it writes.
		uffdtest.LockSettings(t).HugePages(k.clients * k.threads * (2*k.pages + 2))
	}
	k.contents = contents(k.threads*k.pages, k.kind.PageSize())
	k.pager.RetryFor = uffdtest.Patience
	if k.kind.Shared() && !k.memory {
		// A neighbour of what a child has asked for could come when the child is
		// gone, and its parent has discarded that page.
		k.pager.FaultAround = k.kind.PageSize()
	}
	var reports atomic.Uint64
	k.pager.ErrorHook = func(_ *pager.Client, err error) {
		if reports.Add(1) < 10 {
			t.Errorf("reported: %v", err)
		}
	}
	start := time.Now()
	var all sync.WaitGroup
	for range k.clients {
		random := rand.New(rand.NewPCG(random.Uint64(), 0))
		all.Go(func() {
			for !t.Failed() && time.Since(start) < *tortureTime {
				k.processes.Add(1)
				life := min(time.Until(start.Add(*tortureTime)), time.Duration(random.Int64N(int64(4*time.Second))))
				t.Run("", func(t *testing.T) { k.live(t, random, life) })
			}
		})
	}
	all.Wait()
	n := k.pager.Stats()
	t.Logf("%d processes, %d faults (%d missing, %d minor, %d write-protected), %d events (%d forks, %d removes, %d remaps, %d unmaps), "+
		"%d reads (%d failed), %d deferred, %d discarded, %d existed, %d bytes checked in %.1f s",
		k.processes.Load(), n.Missing+n.Minor+n.WriteProtected, n.Missing, n.Minor, n.WriteProtected,
		n.Forks+n.Removes+n.Remaps+n.Unmaps, n.Forks, n.Removes, n.Remaps, n.Unmaps,
		n.Reads, n.ReadErrors, n.Deferred, n.Discarded, n.Existed, k.checked.Load(), time.Since(start).Seconds())
	if n.Missing == 0 || n.Removes == 0 || n.Minor == 0 && k.memory || n.WriteProtected == 0 && k.mode.Has(uffd.RegisterWP) {
		t.Error("something was not tried")
	}
}

// live is the life of one process.
func (k *torture) live(t *testing.T, random *rand.Rand, life time.Duration) {
	proc := uffdtest.Start(t)
	f := proc.Open(events)
	written := &writes{n: make(map[uffd.Addr]int)}
	var regions []pager.Region
	var victims []*victim
	for i := range k.threads {
		mem := proc.Map(k.kind, k.pages)
		register(t, f, mem.Range, k.mode)
		var s source.Source = source.FromBytes(k.contents)
		if i%2 == 1 {
			s = erratic{s}
		}
		v := newVictim(proc, mem, 1<<29, random.Uint64(), &k.checked)
		v.expect(i * k.pages)
		v.forks, v.memory = os.Geteuid() == 0, k.memory
		r := region(mem, s)
		r.Offset = int64(i) * int64(mem.Len)
		if k.memory {
			r.Memory = attachMemory(t, proc, mem)
		}
		if k.mode.Has(uffd.RegisterWP) {
			v.written = written
			r.BeforeWrite = written.count
		}
		regions = append(regions, r)
		victims = append(victims, v)
	}
	c, err := k.pager.Attach(f, regions...)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() { result <- c.Serve(context.Background()) }()
	var all sync.WaitGroup
	end := time.Now().Add(life)
	for _, v := range victims {
		all.Go(func() {
			for time.Now().Before(end) && !t.Failed() && v.step(t) {
			}
		})
	}
	for random.IntN(3) > 0 && time.Now().Before(end) {
		time.Sleep(time.Duration(random.Int64N(int64(life)/2 + 1)))
		if err := c.Populate(context.Background(), nil); err != nil && c.Stats().ReadErrors == 0 {
			t.Errorf("Populate: %v", err)
		}
	}
	all.Wait()
	for _, v := range victims { // to die while faults are under way
		v.Touch(v.mem)
	}
	proc.Kill()
	select {
	case err := <-result:
		if err != nil {
			t.Errorf("Serve = %v", err)
		}
	case <-time.After(uffdtest.Patience):
		t.Error("Serve does not return")
	}
	c.Close()
	f.Close()
}
