package uffdtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// Patience is how long a test waits for what has to happen. It bounds hangs and
// says nothing about speed.
const Patience = 60 * time.Second

// A Role is what a process is for that a test starts with [Command].
type Role struct {
	Name string
	Run  func() error
}

// Main runs the tests, or, in a process that a test started, what that process
// is for. TestMain calls it.
func Main(m *testing.M, roles ...Role) {
	name := os.Getenv(roleVariable)
	if name == "" {
		os.Exit(m.Run())
	}
	roles = append(roles, Role{"restore", restore}, Role{"fault", faulter})
	err := fmt.Errorf("unknown role %q", name)
	for _, r := range roles {
		if r.Name == name {
			err = r.Run()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "uffdtest:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

const roleVariable = "UFFD_TEST_ROLE"

// Command prepares to start this program again, as a process of the given role.
func Command(role string, env ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, roleVariable+"="+role)...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Kind is a kind of memory.
type Kind int

// The kinds that userfaultfd supports.
const (
	Anon           Kind = iota // private anonymous
	Shmem                      // memfd, shared
	ShmemPrivate               // memfd, MAP_PRIVATE
	Hugetlb                    // hugetlb memfd, shared
	HugetlbPrivate             // hugetlb memfd, MAP_PRIVATE
)

// Kinds lists all kinds.
var Kinds = []Kind{Anon, Shmem, ShmemPrivate, Hugetlb, HugetlbPrivate}

func (k Kind) String() string {
	return [...]string{"anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private"}[k]
}

// Huge reports whether k consists of huge pages.
func (k Kind) Huge() bool { return k == Hugetlb || k == HugetlbPrivate }

// Shared reports whether another mapping can see what k holds.
func (k Kind) Shared() bool { return k == Shmem || k == Hugetlb }

// PageSize returns the size of k's pages.
func (k Kind) PageSize() int {
	if k.Huge() {
		return HugePageSize()
	}
	return os.Getpagesize()
}

// Memory is a mapping of a Process.
type Memory struct {
	uffd.Range
	Kind Kind
	FD   int // the memfd in the Process, -1 for Anon
}

// Page returns page i.
func (m Memory) Page(i int) uffd.Range {
	size := uint64(m.Kind.PageSize())
	return uffd.Range{Start: m.Start + uffd.Addr(uint64(i)*size), Len: size}
}

// Pages returns the number of pages.
func (m Memory) Pages() int { return int(m.Len / uint64(m.Kind.PageSize())) }

// A Process is another process, which does with its memory what the test says.
// Its accesses may fault: each request runs on a thread of its own.
type Process struct {
	Pid int

	t      testing.TB
	cmd    *exec.Cmd
	fds    *net.UnixConn
	forks  uint64
	exited chan struct{}

	mu      sync.Mutex
	out     *json.Encoder
	next    int
	waiting map[int]chan reply
}

type request struct {
	ID    int
	Op    string
	Args  [6]uint64
	Steps []Step `json:",omitempty"`
}

type reply struct {
	ID      int
	Values  []uint64
	Errno   int    // of a failed system call
	Failure string // any other error
	Sigbus  bool   // an access raised SIGBUS or SIGSEGV
}

// Start starts a Process. It ends with the test.
func Start(t testing.TB) *Process {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "fds"), os.NewFile(uintptr(pair[1]), "fds")
	defer theirs.Close()
	defer ours.Close()
	fds, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}

	// Many faults may wait at a time, each with a P. Nothing in the process may
	// stop the world, and signals that preempt would repeat faults.
	cmd := Command("fault", "GOMAXPROCS=64", "GOGC=off", "GODEBUG=asyncpreemptoff=1")
	cmd.ExtraFiles = []*os.File{theirs}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &Process{
		Pid:     cmd.Process.Pid,
		t:       t,
		cmd:     cmd,
		fds:     fds.(*net.UnixConn),
		exited:  make(chan struct{}),
		out:     json.NewEncoder(stdin),
		waiting: make(map[int]chan reply),
	}
	go p.receive(stdout)
	t.Cleanup(p.Kill)
	return p
}

func (p *Process) receive(stdout io.Reader) {
	defer close(p.exited)
	in := json.NewDecoder(stdout)
	for {
		var r reply
		if err := in.Decode(&r); err != nil {
			return
		}
		p.mu.Lock()
		p.waiting[r.ID] <- r
		delete(p.waiting, r.ID)
		p.mu.Unlock()
	}
}

// Kill kills the process and waits until it is gone.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.exited
	p.cmd.Wait()
	p.fds.Close()
}

// A Call is a request under way.
type Call struct {
	p     *Process
	what  string
	reply chan reply
}

// Go makes a request without waiting.
func (p *Process) start(op string, steps []Step, args ...uint64) *Call {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.next++
	r := request{ID: p.next, Op: op, Steps: steps}
	copy(r.Args[:], args)
	c := &Call{p, fmt.Sprintf("%s %#x", op, args), make(chan reply, 1)}
	p.waiting[r.ID] = c.reply
	if err := p.out.Encode(r); err != nil {
		p.t.Fatalf("%s: the process is gone: %v", c.what, err)
	}
	return c
}

// ErrSigbus is an access that raised a signal instead of reading or writing.
var ErrSigbus = errors.New("the access raised a signal")

// Result waits for the end of the call.
func (c *Call) Result() ([]uint64, error) {
	c.p.t.Helper()
	var r reply
	select {
	case r = <-c.reply:
	case <-c.p.exited:
		select {
		case r = <-c.reply:
		default:
			return nil, errors.New("the process has exited")
		}
	case <-time.After(Patience):
		c.p.t.Fatalf("%s: still waits after %v", c.what, Patience)
	}
	switch {
	case r.Sigbus:
		return r.Values, ErrSigbus
	case r.Errno != 0:
		return r.Values, syscall.Errno(r.Errno)
	case r.Failure != "":
		return r.Values, errors.New(r.Failure)
	}
	return r.Values, nil
}

// Done reports whether the call is over.
func (c *Call) Done() bool { return len(c.reply) > 0 }

// Value waits for the end of a call that succeeds, and returns what it gave.
func (c *Call) Value() uint64 {
	c.p.t.Helper()
	v, err := c.Result()
	if err != nil {
		c.p.t.Fatalf("%s: %v", c.what, err)
	}
	if len(v) == 0 {
		return 0
	}
	return v[0]
}

// Map maps memory of n pages.
func (p *Process) Map(kind Kind, n int) Memory {
	p.t.Helper()
	length := uint64(n * kind.PageSize())
	v, err := p.start("map", nil, uint64(kind), length).Result()
	if err != nil {
		p.t.Fatalf("mapping %d pages of %v: %v", n, kind, err)
	}
	return Memory{uffd.Range{Start: uffd.Addr(v[0]), Len: length}, kind, int(int64(v[1]))}
}

// Alias maps the file of m once more, shared.
func (p *Process) Alias(m Memory) Memory {
	p.t.Helper()
	m.Start = p.Mmap(0, m.Len, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED, m.FD)
	return m
}

// Mmap calls mmap(2), at offset 0 of the file.
func (p *Process) Mmap(a uffd.Addr, length uint64, prot, flags, fd int) uffd.Addr {
	p.t.Helper()
	return uffd.Addr(p.start("mmap", nil, uint64(a), length, uint64(prot), uint64(flags), uint64(int64(fd))).Value())
}

// Open opens a userfaultfd of the process, for the test process.
func (p *Process) Open(c *uffd.Config) *uffd.File {
	p.t.Helper()
	f, err := p.TryOpen(c)
	if err != nil {
		p.t.Fatal(err)
	}
	return f
}

// TryOpen is Open for configurations that may fail.
func (p *Process) TryOpen(c *uffd.Config) (*uffd.File, error) {
	p.t.Helper()
	if c == nil {
		c = new(uffd.Config)
	}
	if _, err := p.start("open", nil, uint64(c.Faults), uint64(c.Require), uint64(c.Prefer)).Result(); err != nil {
		return nil, err
	}
	var oob [64]byte
	p.fds.SetReadDeadline(time.Now().Add(Patience))
	_, n, _, _, err := p.fds.ReadMsgUnix(make([]byte, 1), oob[:])
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	f, err := uffd.FromFD(fds[0])
	if err != nil {
		return nil, err
	}
	p.t.Cleanup(func() { f.Close() })
	return f, nil
}

// Load reads a byte.
func (p *Process) Load(a uffd.Addr) *Call { return p.start("load", nil, uint64(a)) }

// Store writes a byte.
func (p *Process) Store(a uffd.Addr, b byte) *Call {
	return p.start("store", nil, uint64(a), uint64(b))
}

// Touch reads a byte of each page of m, in order, and returns their sum.
func (p *Process) Touch(m Memory) *Call {
	return p.start("touch", nil, uint64(m.Start), m.Len, uint64(m.Kind.PageSize()))
}

// Fill writes b to every byte of r.
func (p *Process) Fill(r uffd.Range, b byte) *Call {
	return p.start("fill", nil, uint64(r.Start), r.Len, uint64(b))
}

// Check compares every byte of r with b and returns how many differ.
func (p *Process) Check(r uffd.Range, b byte) *Call {
	return p.start("check", nil, uint64(r.Start), r.Len, uint64(b))
}

// Move calls Move of the File that the process opened last: it works nowhere
// else. It returns n.
func (p *Process) Move(dst uffd.Addr, src uffd.Range, mode uffd.MoveMode) *Call {
	return p.start("move", nil, uint64(dst), uint64(src.Start), src.Len, uint64(mode))
}

// Populate calls uffd.Populate in the process.
func (p *Process) Populate(r uffd.Range, write bool) *Call {
	var w uint64
	if write {
		w = 1
	}
	return p.start("populate", nil, uint64(r.Start), r.Len, w)
}

// Close closes the process's own descriptor of the File that it opened last.
func (p *Process) Close() *Call { return p.start("close", nil) }

// Syscall makes a system call in the process and returns its first result.
func (p *Process) Syscall(nr uintptr, args ...uint64) *Call {
	return p.start("syscall", nil, append([]uint64{uint64(nr)}, args...)...)
}

// Madvise calls madvise(2).
func (p *Process) Madvise(r uffd.Range, advice int) *Call {
	return p.Syscall(unix.SYS_MADVISE, uint64(r.Start), r.Len, uint64(advice))
}

// Munmap calls munmap(2).
func (p *Process) Munmap(r uffd.Range) *Call {
	return p.Syscall(unix.SYS_MUNMAP, uint64(r.Start), r.Len)
}

// Mprotect calls mprotect(2).
func (p *Process) Mprotect(r uffd.Range, prot int) *Call {
	return p.Syscall(unix.SYS_MPROTECT, uint64(r.Start), r.Len, uint64(prot))
}

// Mremap calls mremap(2), and returns the new address.
func (p *Process) Mremap(r uffd.Range, newLen uint64, flags int, to uffd.Addr) *Call {
	return p.Syscall(unix.SYS_MREMAP, uint64(r.Start), r.Len, newLen, uint64(flags), uint64(to))
}

// A Step is one thing that a forked process does.
type Step struct {
	Op   StepOp
	Args [6]uint64
}

// StepOp is the kind of a Step.
type StepOp uint64

// The steps.
const (
	StepLoad    StepOp = iota // read the byte at Args[0]: the result
	StepStore                 // write the byte Args[1] to Args[0]
	StepCheck                 // count the bytes at Args[0], length Args[1], that are not Args[2]
	StepMadvise               // madvise(Args[0], Args[1], Args[2])
	StepMunmap                // munmap(Args[0], Args[1])
	StepMremap                // mremap(Args[0], …, Args[4]): the new address
	StepGate                  // wait until [Process.OpenGate]
	StepPagemap               // the child's own pagemap entry of the page at Args[0]
)

// Fork forks the process, and has the child do steps and exit. The call ends with
// the child; it returns the child's pid and the results of the steps.
func (p *Process) Fork(steps ...Step) *Call {
	p.forks++
	return p.start("fork", steps)
}

// AwaitForks waits until every call of Fork has made its child.
func (p *Process) AwaitForks() {
	p.t.Helper()
	for p.start("forks", nil).Value() < p.forks {
		time.Sleep(time.Millisecond)
	}
}

// OpenGate lets the forked process pass one StepGate.
func (p *Process) OpenGate() { p.start("gate", nil).Value() }

// Pagemap returns the pagemap entry of the page at a.
func (p *Process) Pagemap(a uffd.Addr) uint64 {
	p.t.Helper()
	return Pagemap(p.t, p.Pid, a)
}

// Bits of a pagemap entry.
const (
	PagemapPresent = 1 << 63
	PagemapSwap    = 1 << 62
	PagemapUffd    = 1 << 57
)

// Pagemap returns the pagemap entry of a page of any process.
func Pagemap(t testing.TB, pid int, a uffd.Addr) uint64 {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var entry [8]byte
	if _, err := f.ReadAt(entry[:], int64(uint64(a)/uint64(os.Getpagesize())*8)); err != nil {
		t.Fatalf("pagemap of %v: %v", a, err)
	}
	return nativeUint64(entry)
}
