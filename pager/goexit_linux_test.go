package pager_test

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

// A fault outside of all regions that was read together with one whose source ends
// the goroutine comes up again.
func TestGoexitUnknown(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 1)
	unknown := proc.Map(uffdtest.Anon, 1)
	register(t, f, unknown.Range, uffd.RegisterMissing)
	r := region(mem, hooked{source.FromBytes(image(uffdtest.Anon, 1)), func(int) { runtime.Goexit() }})
	c, err := (&pager.Pager{}).Attach(f, r)
	if err != nil {
		t.Fatal(err)
	}
	s := &served{client: c}
	load := proc.Load(mem.Page(0).Start)
	eventually(t, "a fault", func() bool { unread, _ := waitingFaults(t, f); return unread == 1 })
	other := proc.Load(unknown.Page(0).Start)
	eventually(t, "two faults", func() bool { unread, _ := waitingFaults(t, f); return unread == 2 })
	s.start(t)
	t.Log(s.end(t))
	c.Close()
	serve(t, proc, f, &pager.Pager{UnknownZero: true}, region(mem, source.FromBytes(image(uffdtest.Anon, 1))))
	if v := load.Value(); v != 1 {
		t.Errorf("loaded %d", v)
	}
	eventually(t, "the fault outside is served", other.Done)
}

// An ErrorHook that ends the goroutine of Serve does not keep Close from returning.
func TestGoexitChildrenLost(t *testing.T) {
	uffdtest.RequireEventFork(t)
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 2)
	k := keep(t, f, plan{Regions: []planned{{Range: mem.Range, FD: -1}}, Forks: true})
	first := k.start()
	first.says("serves")
	at := mem.Page(0).Start
	child := proc.Fork(uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{uint64(at)}}, uffdtest.Step{Op: uffdtest.StepGate})
	t.Cleanup(proc.OpenGate)
	time.Sleep(300 * time.Millisecond)
	first.kill()
	p := &pager.Pager{ErrorHook: func(*pager.Client, error) { runtime.Goexit() }}
	c, err := p.AttachState(f, k.state, region(mem, source.FromBytes(image(uffdtest.Anon, 2))))
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan error, 1)
	ended := make(chan struct{})
	go func() { defer close(ended); over <- c.Serve(t.Context()) }()
	<-ended
	select {
	case err := <-over:
		t.Log("Serve:", err)
	default:
		t.Error("Serve did not return: its goroutine was ended")
	}
	closed := make(chan error, 1)
	go func() { closed <- c.Close() }()
	select {
	case <-closed:
	case <-time.After(3 * time.Second):
		t.Error("Close hangs")
	}
	_ = child
}

// Events of a batch in which a source ended the goroutine are not applied once more
// by the next client.
func TestGoexitTakeOver(t *testing.T) {
	uffdtest.RequireKernel(t, 5, 7, "MREMAP_DONTUNMAP")
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 3)
	moving := proc.Map(uffdtest.Anon, 2)
	register(t, f, moving.Range, uffd.RegisterMissing)
	state, err := pager.NewState()
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	var exits bool
	regions := []pager.Region{
		region(mem, hooked{source.FromBytes(image(uffdtest.Anon, 3)), func(int) {
			if exits {
				runtime.Goexit()
			}
		}}),
		region(moving, source.FromBytes(image(uffdtest.Anon, 2))),
	}
	attach := func() *pager.Client {
		c, err := (&pager.Pager{FaultAround: 1}).AttachState(f, state, regions...)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	unreadFaults := func(n int) {
		eventually(t, "faults wait", func() bool { unread, _ := waitingFaults(t, f); return unread == n })
	}
	exits = true
	c := attach()
	s := &served{client: c}
	loads := []*uffdtest.Call{proc.Load(mem.Page(0).Start), proc.Load(mem.Page(1).Start)}
	unreadFaults(2)
	to := proc.Map(uffdtest.Anon, 2)
	remap := proc.Mremap(moving.Range, moving.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED|unix.MREMAP_DONTUNMAP, to.Start)
	time.Sleep(100 * time.Millisecond)
	s.start(t)
	t.Log(s.end(t)) // of [fault, fault, remap]
	remap.Value()
	unreadFaults(2)
	if _, err := f.ZeroPage(mem.Page(1), 0); err != nil {
		t.Fatal(err)
	}
	loads[1].Value()
	remove := proc.Madvise(mem.Page(2), unix.MADV_DONTNEED)
	time.Sleep(100 * time.Millisecond)
	s.start(t)
	t.Log(s.end(t)) // of [fault, remove]
	remove.Value()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	exits = false
	s = &served{client: attach(), Process: proc}
	s.start(t)
	defer s.client.Close()
	if v := loads[0].Value(); v != 1 {
		t.Errorf("loaded %d", v)
	}
	s.holds(t, to, 0, 1)
	s.holds(t, to, 1, 2)
	s.holds(t, mem, 2, 0)
}
