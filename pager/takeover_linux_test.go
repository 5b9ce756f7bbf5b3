package pager_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

var takeoverTime = flag.Duration("takeover", 3*time.Second, "how long TestTakeOverTorture runs")

// A plan is what a pager in a process of its own serves.
type plan struct {
	Regions []planned
	Die     bool        // after reading, before anything else
	Forks   bool        // tell of children that were lost
	DieAt   uffd.Ioctls // one of them, for which it is killed when it calls it
	NoRead  bool        // reading messages fails with ENOMEM
}

type planned struct {
	Range   uffd.Range
	Offset  int64
	Kind    uffdtest.Kind
	FD      int // of a file that Memory is to be, or -1
	Erratic bool
}

// contents is what all plans serve: each page is full of a number.
func contents(pages, size int) []byte {
	b := make([]byte, pages*size)
	for i := range b {
		b[i] = byte(1 + i/size%255)
	}
	return b
}

const (
	planVariable = "UFFD_TEST_PLAN"
	planFile     = 3 // descriptors of that process
	planState    = 4
)

// servePlan is that process.
func servePlan() error {
	var plan plan
	if err := json.Unmarshal([]byte(os.Getenv(planVariable)), &plan); err != nil {
		return err
	}
	f, err := uffd.FromFD(planFile)
	if err != nil {
		return err
	}
	var regions []pager.Region
	for _, r := range plan.Regions {
		mem := uffdtest.Memory{Range: r.Range, Kind: r.Kind}
		var s source.Source = source.FromBytes(contents(int(r.Offset)/r.Kind.PageSize()+mem.Pages(), r.Kind.PageSize()))
		if r.Erratic {
			s = erratic{s}
		}
		added := region(mem, s)
		added.Offset = r.Offset
		if r.FD >= 0 {
			if added.Memory, err = unix.Mmap(r.FD, 0, int(mem.Len), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
				return err
			}
		}
		regions = append(regions, added)
	}
	p := &pager.Pager{RetryFor: uffdtest.Patience, ErrorHook: func(_ *pager.Client, err error) {
		if plan.Forks && errors.Is(err, pager.ErrChildrenLost) {
			fmt.Println("children lost")
			return
		}
		if plan.NoRead && errors.Is(err, unix.ENOMEM) {
			fmt.Println("no memory")
			return
		}
		fmt.Fprintln(os.Stderr, "reported:", err)
		os.Exit(1)
	}}
	c, err := p.AttachState(f, os.NewFile(planState, "state"), regions...)
	if err != nil {
		return err
	}
	if plan.Die {
		return pager.DieAfterRead(c)
	}
	if plan.DieAt != 0 {
		if err := dieAt(plan.DieAt); err != nil {
			return err
		}
	}
	if plan.NoRead {
		if err := filterCalls(
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_PREADV2, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOMEM)},
		); err != nil {
			return err
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	fmt.Println("serves")
	if err := c.Serve(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	if err := c.Close(); err != nil {
		return err
	}
	return f.Close()
}

// dieAt has the kernel kill this process when it calls an ioctl, before that does
// anything.
func dieAt(call uffd.Ioctls) error {
	request, ok := call.Request()
	if !ok {
		return fmt.Errorf("%v is not one ioctl", call)
	}
	const nr, request0 = 0, 24 // in struct seccomp_data; the latter is of 64 bits
	at := uint32(request0)
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		at += 4
	}
	return filterCalls(
		unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nr},
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_IOCTL, Jf: 3},
		unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at},
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: request, Jf: 1},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_KILL_PROCESS},
	)
}

// filterCalls has the kernel treat the system calls of this process as a program
// says, which allows what it runs through.
func filterCalls(filter ...unix.SockFilter) error {
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread() // the other threads get both from this one
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if _, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&program))); e != 0 {
		return os.NewSyscallError("seccomp", e)
	}
	return nil
}

// A keeper holds what a pager in another process serves.
type keeper struct {
	t     testing.TB
	plan  plan
	file  *os.File // the userfaultfd
	state *os.File
	extra []*os.File
}

func keep(t testing.TB, f *uffd.File, plan plan, extra ...*os.File) *keeper {
	t.Helper()
	state, err := pager.NewState()
	if err != nil {
		t.Fatal(err)
	}
	k := &keeper{t: t, plan: plan, state: state, extra: extra}
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	conn.Control(func(fd uintptr) {
		var dup int
		if dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			k.file = os.NewFile(uintptr(dup), "userfaultfd")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.file.Close(); k.state.Close() })
	return k
}

// A pagerProcess is such a pager.
type pagerProcess struct {
	*exec.Cmd
	t   testing.TB
	out *bufio.Reader
}

func (k *keeper) start() *pagerProcess {
	k.t.Helper()
	encoded, err := json.Marshal(k.plan)
	if err != nil {
		k.t.Fatal(err)
	}
	cmd := uffdtest.Command("pager", planVariable+"="+string(encoded))
	cmd.ExtraFiles = append([]*os.File{k.file, k.state}, k.extra...)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		k.t.Fatal(err)
	}
	p := &pagerProcess{cmd, k.t, bufio.NewReader(out)}
	k.t.Cleanup(func() { p.Process.Kill(); p.Wait() })
	return p
}

// says waits for a line of output.
func (p *pagerProcess) says(want string) {
	p.t.Helper()
	if line, err := p.out.ReadString('\n'); line != want+"\n" {
		p.t.Fatalf("the pager says %q, %v; want %q", line, err, want)
	}
}

func (p *pagerProcess) kill() {
	p.Process.Kill()
	p.Wait()
}

// end has the process hand over in peace.
func (p *pagerProcess) end() {
	p.t.Helper()
	p.Process.Signal(unix.SIGTERM)
	if err := p.Wait(); err != nil {
		p.t.Errorf("the pager ended with %v", err)
	}
}

// A pager that dies with events it has read, and nothing else done, does not take
// them along: memory that was discarded, moved or unmapped is so for the next one.
func TestTakeOverLosesNoEvent(t *testing.T) {
	const pages = 8
	for _, test := range []struct {
		name  string
		event func(s *uffdtest.Process, mem *uffdtest.Memory) *uffdtest.Call
		want  [pages]byte
	}{
		{"remove", func(s *uffdtest.Process, mem *uffdtest.Memory) *uffdtest.Call {
			return s.Madvise(uffd.Range{Start: mem.Page(1).Start, Len: uint64(2 * pageSize)}, unix.MADV_DONTNEED)
		}, [pages]byte{1, 0, 0, 4, 5, 6, 7, 8}},
		{"remap", func(s *uffdtest.Process, mem *uffdtest.Memory) *uffdtest.Call {
			to := s.Map(uffdtest.Anon, pages)
			call := s.Mremap(mem.Range, mem.Len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to.Start)
			*mem = to
			return call
		}, [pages]byte{1, 2, 3, 4, 5, 6, 7, 8}},
		{"unmap", func(s *uffdtest.Process, mem *uffdtest.Memory) *uffdtest.Call {
			call := s.Munmap(mem.Page(pages - 1))
			mem.Len -= uint64(pageSize)
			return call
		}, [pages]byte{1, 2, 3, 4, 5, 6, 7}},
	} {
		t.Run(test.name, func(t *testing.T) {
			proc := uffdtest.Start(t)
			mem, f := mapped(t, proc, uffdtest.Anon, pages)
			k := keep(t, f, plan{Regions: []planned{{Range: mem.Range, FD: -1}}})
			first := k.start()
			first.says("serves")
			if n := proc.Check(mem.Page(0), 1).Value(); n != 0 {
				t.Fatalf("%d bytes differ", n)
			}
			first.kill()
			k.plan.Die = true
			second := k.start()
			event := test.event(proc, &mem)
			second.Wait() // killed by itself
			if status := second.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != unix.SIGKILL {
				t.Fatalf("the pager did not die: %v", second.ProcessState)
			}
			k.plan.Die = false
			k.start().says("serves")
			event.Value()
			for i := range mem.Pages() {
				if n := proc.Check(mem.Page(i), test.want[i]).Value(); n != 0 {
					t.Errorf("page %d: %d bytes are not %d", i, n, test.want[i])
				}
			}
		})
	}
}

// A fault that a pager has read before it died is served by the next one.
func TestTakeOverServesFaults(t *testing.T) {
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 4)
	k := keep(t, f, plan{Regions: []planned{{Range: mem.Range, FD: -1}}, Die: true})
	dying := k.start()
	load := proc.Load(mem.Page(2).Start)
	dying.Wait()
	if load.Done() {
		t.Fatal("nobody served the fault, and it is over")
	}
	k.plan.Die = false
	k.start().says("serves")
	if b := load.Value(); b != 3 {
		t.Errorf("loaded %d, want 3", b)
	}
}

// Reading the event of a fork takes memory: a pager without waits for that, and the
// next one finds everything.
func TestReadWithoutMemory(t *testing.T) {
	uffdtest.RequireFile(t, "/proc/sys/kernel/seccomp/actions_avail", "") // filters
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 2)
	k := keep(t, f, plan{Regions: []planned{{Range: mem.Range, FD: -1}}, NoRead: true})
	poor := k.start()
	poor.says("serves")
	load := proc.Load(mem.Page(1).Start)
	for range 3 {
		poor.says("no memory")
	}
	poor.kill()
	k.plan.NoRead = false
	k.start().says("serves")
	if b := load.Value(); b != 2 {
		t.Errorf("loaded %d, want 2", b)
	}
}

// Children cannot be taken over, and that is reported.
func TestTakeOverReportsChildren(t *testing.T) {
	uffdtest.RequireRoot(t)
	proc := uffdtest.Start(t)
	mem, f := mapped(t, proc, uffdtest.Anon, 4)
	k := keep(t, f, plan{Regions: []planned{{Range: mem.Range, FD: -1}}, Forks: true})
	first := k.start()
	first.says("serves")
	load := uffdtest.Step{Op: uffdtest.StepLoad, Args: [6]uint64{uint64(mem.Start)}}
	child := proc.Fork(load, uffdtest.Step{Op: uffdtest.StepGate})
	proc.AwaitForks()
	t.Cleanup(proc.OpenGate) // also if the test fails: nobody else ends the child
	first.kill()
	second := k.start()
	second.says("serves")
	second.says("children lost")
	proc.OpenGate()
	child.Result()
	second.kill()
	third := k.start()
	third.says("serves")
	third.end() // and does not report them again
	if rest, _ := third.out.ReadString(0); rest != "" {
		t.Errorf("the pager says %q", rest)
	}
}

// Shared memory that a pager has written and its process has changed since is not
// written again by the next pager.
func TestTakeOverOfSharedMemory(t *testing.T) {
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	const pages = 64
	proc := uffdtest.Start(t)
	mem := proc.Map(uffdtest.Shmem, pages)
	f := proc.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
	shared := openShared(t, proc, mem)
	k := keep(t, f, plan{Regions: []planned{{Range: mem.Range, Kind: mem.Kind, FD: 5}}}, shared)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var model [pages]byte
	for i := range model {
		model[i] = byte(i + 1)
	}
	for range 10 {
		p := k.start()
		p.says("serves")
		for range 20 {
			switch i := random.IntN(pages); random.IntN(3) {
			case 0:
				model[i] = byte(random.Uint32())
				proc.Fill(mem.Page(i), model[i]).Value()
			case 1:
				if n := proc.Check(mem.Page(i), model[i]).Value(); n != 0 {
					t.Fatalf("page %d: %d bytes are not %d", i, n, model[i])
				}
			case 2:
				proc.Madvise(mem.Page(i), unix.MADV_REMOVE).Value()
				model[i] = 0
			}
		}
		p.kill()
	}
}

// The same if the pager dies where it maps the page: its process may have written
// to it by then.
func TestTakeOverOfMappedPage(t *testing.T) {
	uffdtest.RequireFile(t, "/proc/sys/kernel/seccomp/actions_avail", "") // filters that kill a process
	uffdtest.Require(t, uffd.FeatureMinorShmem)
	proc := uffdtest.Start(t)
	mem := proc.Map(uffdtest.Shmem, 2)
	f := proc.Open(events)
	register(t, f, mem.Range, uffd.RegisterMissing|uffd.RegisterMinor)
	k := keep(t, f, plan{Regions: []planned{{Range: mem.Range, Kind: mem.Kind, FD: 5}}, DieAt: uffd.IoctlContinue}, openShared(t, proc, mem))
	first := k.start()
	first.says("serves")
	load := proc.Load(mem.Page(1).Start)
	first.Wait()
	if status := first.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != unix.SIGSYS {
		t.Fatalf("the pager was not killed at the ioctl: %v", first.ProcessState)
	}
	file := attachMemory(t, proc, mem)
	if b := file[pageSize+1]; b != 2 {
		t.Fatalf("the page holds %d, want 2", b)
	}
	file[pageSize] = 9 // as the process would
	k.plan.DieAt = 0
	second := k.start()
	second.says("serves")
	if b := load.Value(); b != 9 {
		t.Errorf("loaded %d, want 9", b)
	}
	if n := proc.Check(mem.Page(0), 1).Value(); n != 0 {
		t.Errorf("page 0: %d bytes are not 1", n)
	}
	second.kill()
	k.start().says("serves")
	if err := unix.Madvise(file[:pageSize], unix.MADV_REMOVE); err != nil { // no event tells of it
		t.Fatal(err)
	}
	if b := proc.Load(mem.Page(0).Start).Value(); b != 0 {
		t.Errorf("loaded %d from a page that was discarded, want 0", b)
	}
}

// openShared opens the file of a process's memory here.
func openShared(t testing.TB, proc *uffdtest.Process, mem uffdtest.Memory) *os.File {
	t.Helper()
	fd, err := unix.PidfdOpen(proc.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	file, err := unix.PidfdGetfd(fd, mem.FD, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(file), "shared memory")
	t.Cleanup(func() { f.Close() })
	return f
}

// A stall is how long it took until the next pager, started at once, answered:
// until it served, and until a thread that asked for a page while there was no
// pager had it.
type stall struct{ served, answered []time.Duration }

func (s *stall) String() string {
	show := func(d []time.Duration) string {
		slices.Sort(d)
		return fmt.Sprintf("median %v, maximum %v", d[len(d)/2].Round(time.Microsecond), d[len(d)-1].Round(time.Microsecond))
	}
	if len(s.answered) == 0 {
		return "not measured"
	}
	return fmt.Sprintf("%d times from the kill until the next pager serves: %s; until it has answered a fault: %s",
		len(s.answered), show(s.served), show(s.answered))
}

// TestTakeOverTorture kills pagers, and has them hand over in peace, at random
// moments while a process loads, stores, discards, moves and unmaps, and compares
// all memory with what it should be.
func TestTakeOverTorture(t *testing.T) {
	seed := *tortureSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	const threads, pages, life = 4, 256, 2 * time.Second
	start := time.Now()
	var checked atomic.Uint64
	var killed, ended int
	var stall stall
	for time.Since(start) < *takeoverTime && !t.Failed() {
		proc := uffdtest.Start(t)
		f := proc.Open(&uffd.Config{Prefer: pager.Events &^ uffd.FeatureEventFork})
		var plan plan
		var victims []*victim
		for i := range threads {
			mem := proc.Map(uffdtest.Anon, pages)
			register(t, f, mem.Range, uffd.RegisterMissing)
			plan.Regions = append(plan.Regions, planned{Range: mem.Range, Offset: int64(i * pages * pageSize), FD: -1, Erratic: i%2 == 1})
			room := uint64(1) << 32
			if strconv.IntSize == 32 {
				room = 1 << 28
			}
			v := newVictim(proc, mem, room, random.Uint64(), &checked)
			v.expect(i * pages)
			victims = append(victims, v)
		}
		probe := proc.Map(uffdtest.Anon, pages) // touched once a page, after a kill
		register(t, f, probe.Range, uffd.RegisterMissing)
		plan.Regions = append(plan.Regions, planned{Range: probe.Range, FD: -1})
		probes := 0
		var load *uffdtest.Call // that waits
		var dead time.Time

		k := keep(t, f, plan)
		end := time.Now().Add(min(life, *takeoverTime))
		var all sync.WaitGroup
		for _, v := range victims {
			all.Go(func() {
				for time.Now().Before(end) && !t.Failed() && v.step(t) {
				}
			})
		}
		over := make(chan struct{})
		go func() { all.Wait(); close(over) }()
		for alive := true; alive; {
			p := k.start()
			p.says("serves")
			if load != nil {
				stall.served = append(stall.served, time.Since(dead))
				if b := load.Value(); b != uint64(probes) {
					t.Errorf("page %d holds %d, want %d", probes-1, b, probes)
				}
				stall.answered = append(stall.answered, time.Since(dead))
				load = nil
			}
			select {
			case <-over:
				alive = false
			case <-time.After(rand.N(20 * time.Millisecond)):
			}
			if random.IntN(4) == 0 {
				p.end()
				ended++
			} else {
				dead = time.Now()
				p.kill()
				killed++
				if probes < 255 {
					load = proc.Load(probe.Page(probes).Start)
					probes++
				}
			}
		}
		p := k.start()
		p.says("serves")
		for _, v := range victims { // everything, at the end
			for i := range v.model {
				v.check(t, v.mem, i)
			}
		}
		p.end()
		proc.Kill()
		f.Close()
	}
	t.Logf("%d pagers killed, %d ended in peace, %d bytes checked in %.1f s", killed, ended, checked.Load(), time.Since(start).Seconds())
	t.Log(&stall)
	if killed == 0 || checked.Load() == 0 {
		t.Error("nothing was tried")
	}
}
