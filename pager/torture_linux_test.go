package pager_test

import (
	"context"
	"flag"
	"math/rand/v2"
	"os"
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
	}
	return s.Source.ReadAt(ctx, p, off)
}

// A victim is a thread with memory of its own and a model of what is there.
type victim struct {
	*uffdtest.Process
	random  *rand.Rand
	mem     uffdtest.Memory
	model   []byte // what each page is full of
	checked *atomic.Uint64
	room    uffd.Range // to move to: no address is used twice
	forks   bool       // the pager can serve children
}

func (v *victim) span(t testing.TB) (first, n int, r uffd.Range) {
	first = v.random.IntN(len(v.model))
	n = 1 + v.random.IntN(min(8, len(v.model)-first))
	r = v.mem.Page(first)
	r.Len *= uint64(n)
	return first, n, r
}

func (v *victim) set(first, n int, b byte) {
	for i := range n {
		v.model[first+i] = b
	}
}

// step does one thing at random. It reports false if that showed a wrong byte.
func (v *victim) step(t testing.TB) bool {
	first, n, r := v.span(t)
	switch op := v.random.IntN(100); {
	case op < 50:
		for i := first; i < first+n; i++ {
			if wrong := v.Check(v.mem.Page(i), v.model[i]).Value(); wrong != 0 {
				t.Errorf("page %d of %v: %d bytes are not %d but like %d", i, v.mem.Range, wrong, v.model[i],
					v.Load(v.mem.Page(i).Start).Value())
				return false
			}
			v.checked.Add(uint64(pageSize))
		}
	case op < 65:
		b := byte(v.random.Uint32())
		v.Fill(r, b).Value()
		v.set(first, n, b)
	case op < 85:
		v.Madvise(r, unix.MADV_DONTNEED).Value()
		v.set(first, n, 0)
	case op < 91 && v.room.Len >= v.mem.Len:
		to := v.room.Start
		v.room = v.room.Skip(int64(v.mem.Len))
		v.mem.Start = uffd.Addr(v.Mremap(v.mem.Range, v.mem.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to).Value())
	case op < 93 && len(v.model) > 8:
		last := v.mem.Page(len(v.model) - 1)
		v.Munmap(last).Value()
		v.mem.Len -= last.Len
		v.model = v.model[:len(v.model)-1]
	case op < 97 && v.forks:
		at := uint64(r.Start)
		other := v.random.IntN(len(v.model))
		results, err := v.Fork(
			uffdtest.Step{Op: uffdtest.StepCheck, Args: [6]uint64{uint64(v.mem.Page(first).Start), uint64(pageSize), uint64(v.model[first])}},
			uffdtest.Step{Op: uffdtest.StepMadvise, Args: [6]uint64{at, r.Len, unix.MADV_DONTNEED}},
			uffdtest.Step{Op: uffdtest.StepCheck, Args: [6]uint64{at, r.Len, 0}},
			uffdtest.Step{Op: uffdtest.StepStore, Args: [6]uint64{uint64(v.mem.Page(other).Start), 99}},
		).Result()
		if err != nil {
			t.Error(err)
			return false
		}
		if results[1] != 0 || results[3] != 0 {
			t.Errorf("a child of %v: %d bytes of page %d are not %d, %d of %v are not 0", v.mem.Range, results[1], first, v.model[first], results[3], r)
			return false
		}
		v.checked.Add(uint64(pageSize) + r.Len)
	}
	return true
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
	const (
		clients = 3
		threads = 4
		pages   = 64
	)
	before := descriptors(t)
	contents := make([]byte, threads*pages*pageSize)
	for i := range contents {
		contents[i] = byte(1 + i/pageSize%255)
	}
	p := &pager.Pager{RetryFor: uffdtest.Patience}
	var reports atomic.Uint64
	p.ErrorHook = func(_ *pager.Client, err error) {
		if reports.Add(1) < 10 {
			t.Errorf("reported: %v", err)
		}
	}
	start := time.Now()
	var checked, processes atomic.Uint64
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(i)))
			for !t.Failed() && time.Since(start) < *tortureTime {
				processes.Add(1)
				life := min(time.Until(start.Add(*tortureTime)), 5*time.Second)
				t.Run("", func(t *testing.T) { torture(t, p, random, contents, threads, pages, life, &checked) })
			}
		})
	}
	all.Wait()
	eventually(t, "all descriptors are closed", func() bool { return descriptors(t) == before })
	n := p.Stats()
	t.Logf("%d processes, %d faults, %d events (%d forks, %d removes, %d remaps, %d unmaps), %d reads (%d failed), %d deferred, %d discarded, %d existed, %d bytes checked in %.1f s",
		processes.Load(), n.Missing, n.Forks+n.Removes+n.Remaps+n.Unmaps, n.Forks, n.Removes, n.Remaps, n.Unmaps,
		n.Reads, n.ReadErrors, n.Deferred, n.Discarded, n.Existed, checked.Load(), time.Since(start).Seconds())
	if n.Missing == 0 || n.Removes == 0 || n.Remaps == 0 || n.Unmaps == 0 || n.ReadErrors == 0 {
		t.Error("something was not tried")
	}
}

// torture is the life of one process.
func torture(t *testing.T, p *pager.Pager, random *rand.Rand, contents []byte, threads, pages int, life time.Duration, checked *atomic.Uint64) {
	proc := uffdtest.Start(t)
	f := proc.Open(events)
	var regions []pager.Region
	var victims []*victim
	for i := range threads {
		mem := proc.Map(uffdtest.Anon, pages)
		register(t, f, mem.Range, uffd.RegisterMissing)
		var s source.Source = source.FromBytes(contents)
		if i%2 == 1 {
			s = erratic{s}
		}
		r := region(mem, s)
		r.Offset = int64(i * pages * pageSize)
		regions = append(regions, r)
		v := &victim{Process: proc, mem: mem, checked: checked, random: rand.New(rand.NewPCG(random.Uint64(), 0)), forks: os.Geteuid() == 0}
		const room = 1 << 29
		v.room = uffd.Range{Len: room, Start: proc.Mmap(0, room, unix.PROT_NONE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE, -1)}
		for page := range pages {
			v.model = append(v.model, byte(1+(i*pages+page)%255))
		}
		victims = append(victims, v)
	}
	c, err := p.Attach(f, regions...)
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
	if random.IntN(2) == 0 {
		time.Sleep(time.Duration(random.Int64N(int64(life) + 1)))
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
