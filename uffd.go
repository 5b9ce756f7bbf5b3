// Package uffd binds Linux userfaultfd(2): page faults handled in user space.
//
// A userfaultfd belongs to the process that opens it. Memory of that process is
// registered with it, and from then on a thread that touches a page which is
// missing, or write-protected, or not mapped yet, sleeps until somebody who
// holds the descriptor resolves the fault. That is mostly another process,
// which received the descriptor over a unix socket:
//
//	// serve fills the memory from base on with image, page by page, as another
//	// process touches it.
//	func serve(f *uffd.File, base uffd.Addr, image []byte) error {
//		size := uint64(os.Getpagesize())
//		for {
//			m, err := f.ReadMsg()
//			if err != nil {
//				return err
//			}
//			fault, ok := m.Pagefault()
//			if !ok {
//				continue
//			}
//			page := uffd.Range{Start: fault.Addr, Len: size}
//			_, err = f.Copy(page.Start, image[page.Start-base:][:size], 0)
//			if errors.Is(err, fs.ErrExist) || errors.Is(err, uffd.ErrRetry) { // let the thread look again
//				err = f.Wake(page)
//			}
//			if err != nil {
//				return err
//			}
//		}
//	}
//
// This package is the kernel's interface, whole and exact, from Linux 4.3 to
// 7.3: one method for each ioctl, and no policy. The handler above has one
// process, one region and no events; what serves many of them, with REMOVE,
// fork and sources that fail, is more work than a loop.
//
// # Partial results
//
// Copy, ZeroPage, Continue, Poison and Move return how many bytes are done,
// which is never negative. If n is less than the length, err says why. The
// package never tries again by itself: see [ErrRetry].
//
// # Short calls
//
// Calls on up to 64 KiB are made without telling Go's scheduler, which would cost
// about as much as the kernel takes for a page. When such a call has to wait, it
// holds a P meanwhile, and with it the garbage collector: for a source or a file
// that is not in memory, for memory to become free, or for a process that is
// changing its mappings, as in a fork. Longer calls do not.
//
// # Waking
//
// What installs a page wakes the threads that wait for it, unless its mode says
// DontWake. A call that fails without progress wakes nobody, not even when it
// fails because the page is there already (EEXIST): call [File.Wake] then, or
// the thread sleeps on.
//
// # Faults in the same process
//
// A goroutine that waits in a page fault keeps its P, and can be preempted only
// where compiled Go code does the access. copy, append, bytes.Equal, map and
// hash code are assembly: a goroutine that faults in one of them cannot be
// stopped. So, if the handler is a goroutine of the same process:
//
//   - the garbage collector, or whatever else stops the world, waits for the
//     faulting goroutine, which waits for the handler, which waits for the
//     collector: the process hangs, at any GOMAXPROCS, the first time the
//     handler allocates or the collector runs;
//   - as many faulting goroutines as GOMAXPROCS leave no P for the handler: the
//     process hangs without any collector.
//
// Neither a locked thread nor GOGC=off helps. Serve faults from another
// process; or fault the memory in with [Populate] before it is touched, for a
// goroutine that faults inside a system call gives its P away; or use
// [FeatureSigbus], where no handler is waited for. The same goes for a handler
// that touches, or passes to Copy, memory that it serves itself.
//
// # Lifetime
//
// When the last descriptor of a userfaultfd is closed, the kernel unregisters
// all memory and wakes every thread, and missing anonymous pages read as zeros
// from then on: data is lost without an error. That is why nothing but
// [File.Close] closes a File (an unreachable File stays open), why descriptors
// are close-on-exec, and why a process that may not die with wrong memory should
// have somebody else hold a duplicate.
//
// # Other systems
//
// The package compiles everywhere. Outside of Linux every call returns an error
// that is [errors.ErrUnsupported].
package uffd

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// Addr is an address in the process whose memory is registered. It is not a
// pointer: that process is mostly another one.
type Addr uint64

// String formats a as hexadecimal.
func (a Addr) String() string { return fmt.Sprintf("%#x", uint64(a)) }

// Range is the memory of Len bytes from Start on. Calls that take one want both
// in whole pages: of the system's page size ([os.Getpagesize]), on hugetlb
// memory of the huge page's.
type Range struct {
	Start Addr
	Len   uint64
}

// RangeOf returns the range of mem. It is meant for memory that mmap(2)
// returned: the Go heap cannot be registered.
func RangeOf(mem []byte) Range {
	return Range{Addr(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))), uint64(len(mem))}
}

// End returns the first address behind r.
func (r Range) End() Addr { return r.Start + Addr(r.Len) }

// Contains reports whether a lies in r.
func (r Range) Contains(a Addr) bool { return a >= r.Start && uint64(a-r.Start) < r.Len }

// Skip returns r without its first n bytes: what is left after a call that
// returned n. It is empty if n is not less than r.Len.
func (r Range) Skip(n int64) Range {
	skip := min(uint64(max(n, 0)), r.Len)
	return Range{r.Start + Addr(skip), r.Len - skip}
}

// String formats r as "[start, end)" in hexadecimal.
func (r Range) String() string { return fmt.Sprintf("[%v, %v)", r.Start, r.End()) }

// pageMask has the bits that are zero in the address of a page.
var pageMask = uint64(os.Getpagesize() - 1)

// check finds what the kernel would refuse in any range.
func (r Range) check() refusal {
	switch {
	case r.Len == 0:
		return refusalEmpty
	case uint64(r.Start)&pageMask != 0:
		return refusalStart
	case r.Len&pageMask != 0:
		return refusalLength
	case uint64(r.Start)+r.Len < r.Len:
		return refusalOverflow
	}
	return refusalNone
}

// Faults says which faults a userfaultfd traps.
type Faults uint8

const (
	// BestFaults is AllFaults where that is permitted, else UserFaults.
	BestFaults Faults = iota

	// AllFaults traps faults in user and in kernel mode: also those of system
	// calls on the memory, and of a KVM guest's. It needs access to
	// /dev/userfaultfd (Linux 6.1), or CAP_SYS_PTRACE, or
	// vm.unprivileged_userfaultfd=1 (before Linux 5.11 that is the default).
	AllFaults

	// UserFaults traps faults in user mode only (UFFD_USER_MODE_ONLY, Linux
	// 5.11). No privilege is needed. System calls on missing memory fail with
	// EFAULT, and it cannot back a KVM guest.
	UserFaults
)

// String returns the constant's name.
func (f Faults) String() string {
	switch f {
	case BestFaults:
		return "BestFaults"
	case AllFaults:
		return "AllFaults"
	case UserFaults:
		return "UserFaults"
	}
	return fmt.Sprintf("Faults(%d)", uint8(f))
}

// Config says what [New] opens. The zero Config opens the best that is
// permitted, without features.
type Config struct {
	// Faults to trap.
	Faults Faults
	// Require names features without which New fails.
	Require Features
	// Prefer names features to enable where the kernel offers them.
	// FeatureEventFork is left out where the caller lacks CAP_SYS_PTRACE, and
	// FeatureRWPAsync where FeatureRWP is not enabled.
	Prefer Features
}

// New opens a userfaultfd for the calling process and negotiates its features;
// a nil Config is the zero one. [File.Features] and [File.UserModeOnly] say what
// it got.
//
// Errors: [*OpenError] if no userfaultfd can be opened, [*FeatureError] if a
// required feature is missing, EPERM if FeatureEventFork is required without
// CAP_SYS_PTRACE.
func New(c *Config) (*File, error) {
	if c == nil {
		c = new(Config)
	}
	want := c.Require
	if want|c.Prefer != 0 {
		offered, err := probe(c.Faults)
		if err != nil {
			return nil, err
		}
		if missing := c.Require &^ offered; missing != 0 {
			return nil, &FeatureError{Missing: missing, Offered: offered}
		}
		want |= c.Prefer & offered
		if !want.Has(FeatureRWP) {
			want &^= FeatureRWPAsync &^ c.Require
		}
	}
	f, err := Open(c.Faults)
	if err != nil {
		return nil, err
	}
	_, _, err = f.API(want)
	if errors.Is(err, os.ErrPermission) && want.Has(FeatureEventFork) && !c.Require.Has(FeatureEventFork) {
		_, _, err = f.API(want &^ FeatureEventFork)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Open opens a userfaultfd for the calling process (userfaultfd(2), Linux 4.3,
// or /dev/userfaultfd, Linux 6.1). [File.API] must follow; [New] does both. The
// descriptor is close-on-exec and non-blocking.
//
// Errors: [*OpenError], which names every way that was tried.
func Open(faults Faults) (*File, error) { return open(faults) }

// OpenDevice opens a userfaultfd for the calling process from dev, an open
// /dev/userfaultfd (USERFAULTFD_IOC_NEW, Linux 6.1): a process without
// privilege can be handed the device by one that may open it. BestFaults means
// AllFaults here. [File.API] must follow. dev stays the caller's and may be
// closed.
//
// Errors: [*OpenError].
func OpenDevice(dev *os.File, faults Faults) (*File, error) { return openDevice(dev, faults) }

// FromFD adopts fd, a userfaultfd that has been through API: mostly one that
// another process opened and sent. The File owns fd, unless FromFD fails. It is
// made close-on-exec and non-blocking; the latter is a property of the open file
// that all processes share which hold it.
//
// The features are read from /proc/self/fdinfo, so /proc must be mounted.
//
// Errors: EBADF if fd is not a userfaultfd, EINVAL if it has not been through
// API yet.
func FromFD(fd int) (*File, error) { return fromFD(fd) }

// Probe asks the kernel which features it offers, on a descriptor that is
// thrown away: negotiation is possible once per descriptor.
//
// Errors: [*OpenError].
func Probe() (Features, error) { return probe(BestFaults) }

func probe(faults Faults) (Features, error) {
	f, err := Open(faults)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	offered, _, err := f.API(0)
	return offered, err
}

// Populate faults mem in, through a system call, so that no goroutine holds up
// the scheduler while it waits (madvise(2) with MADV_POPULATE_READ or
// MADV_POPULATE_WRITE, Linux 5.14; before that by other system calls that
// fault pages in one at a time). With write, the pages are made writable as a
// write would; contents are kept either way. Pages that are only partly in mem
// are faulted in as a whole.
//
// It makes memory of the calling process safe to use in the presence of a
// handler in the same process, as long as nobody discards the pages again. Of
// a userfaultfd with [UserFaults] or [FeatureSigbus] it fails.
//
// Errors: EFAULT if a fault cannot be served, EHWPOISON if a page is poisoned
// (EFAULT before Linux 5.14), ENOMEM if part of mem is not mapped, EINVAL if
// the mapping cannot be populated.
func Populate(mem []byte, write bool) error {
	if len(mem) == 0 {
		return nil
	}
	return populate(mem, write)
}

// File is an open userfaultfd. All methods are safe for concurrent use. Until API
// has succeeded, those that use the descriptor fail with EINVAL, but for API and
// Close; after Close they fail with [os.ErrClosed].
//
// Whoever holds the descriptor acts on the memory of the process that opened it
// (of the child, for one that came with a fork event), never on its own.
//
// Errors of all methods are [*Error], but for the [*FeatureError] of API.
type File struct {
	fd    int
	state atomic.Uint32 // one of the states below

	// calls is held for reading by calls that use fd and for writing by API and
	// Close. Waiting for messages is up to the poller's own count.
	calls sync.RWMutex

	features     atomic.Uint64
	userModeOnly bool
	modeKnown    bool

	reader   *reader // nil before stateReady
	deadline deadline

	// poller is nil until somebody waits for messages: each fault wakes whoever
	// polls the descriptor, also in processes that only hold it.
	poller atomic.Pointer[poller]
}

// A poller is fd in Go's poller.
type poller struct {
	file *os.File
	conn syscall.RawConn
}

// The states of a File.
const (
	stateNone  = iota // not from a constructor
	stateOpen         // waits for API
	stateReady        // has been through API
	stateClosed
)

// begin keeps the descriptor open until end, if the File is ready.
func (f *File) begin(op op) error {
	if err := f.ready(op); err != nil {
		return err
	}
	f.calls.RLock()
	if f.state.Load() != stateReady {
		f.calls.RUnlock()
		return refusalClosed.error(op)
	}
	return nil
}

// beginRange is begin for a call on r.
func (f *File) beginRange(op op, r Range) error {
	if err := f.begin(op); err != nil {
		return err
	}
	if refusal := r.check(); refusal != refusalNone {
		f.end()
		return refusal.error(op)
	}
	return nil
}

func (f *File) end() { f.calls.RUnlock() }

func (f *File) ready(op op) error {
	if !supported {
		return refusalUnsupported.error(op)
	}
	if f == nil {
		return refusalInvalid.error(op)
	}
	switch f.state.Load() {
	case stateReady:
		return nil
	case stateOpen:
		return refusalNoAPI.error(op)
	case stateNone:
		return refusalInvalid.error(op)
	}
	return refusalClosed.error(op)
}

// API negotiates the features to enable (UFFDIO_API, Linux 4.3). It returns what
// the kernel offers, which may be more than what is enabled now: that is
// [File.Features]. ioctls are the operations of the descriptor itself; those of
// a range come from Register.
//
// It succeeds once for each descriptor; after a failure it can be tried again.
// To learn what is offered before asking, use [Probe].
//
// Errors: [*FeatureError] if a feature is not offered, EPERM if FeatureEventFork
// is asked for without CAP_SYS_PTRACE, EINVAL if API has succeeded before or
// FeatureRWPAsync comes without FeatureRWP.
func (f *File) API(want Features) (offered Features, ioctls Ioctls, err error) {
	if !supported {
		return 0, 0, refusalUnsupported.error(opAPI)
	}
	if f == nil || f.state.Load() == stateNone {
		return 0, 0, refusalInvalid.error(opAPI)
	}
	if f.state.Load() == stateOpen { // else there may be calls under way, which Lock waits for
		f.calls.Lock()
		defer f.calls.Unlock()
	}
	switch f.state.Load() {
	case stateReady:
		return 0, 0, refusalSecondAPI.error(opAPI)
	case stateClosed:
		return 0, 0, refusalClosed.error(opAPI)
	}
	offered, ioctls, err = f.api(want)
	if err != nil {
		return 0, 0, err
	}
	if missing := want &^ offered; missing != 0 { // Linux 6.5 on i386 accepts what it does not offer
		return 0, 0, &FeatureError{Missing: missing, Offered: offered}
	}
	return offered, ioctls, f.join(opAPI, want)
}

// join makes f ready, with what is enabled.
func (f *File) join(op op, enabled Features) error {
	if enabled.Has(FeatureWPAsync) {
		enabled |= FeatureWPUnpopulated
	}
	f.features.Store(uint64(enabled))
	f.reader = newReader()
	if !f.state.CompareAndSwap(stateOpen, stateReady) {
		return refusalClosed.error(op)
	}
	return nil
}

// Features returns the features that are enabled, with those that others imply:
// FeatureWPAsync turns on FeatureWPUnpopulated. It is 0 before API.
func (f *File) Features() Features { return Features(f.features.Load()) }

// UserModeOnly reports whether only faults in user mode are trapped, as with
// [UserFaults]. It is not known of an adopted descriptor, because the kernel
// does not tell.
func (f *File) UserModeOnly() (only, known bool) { return f.userModeOnly, f.modeKnown }

// Child adopts the descriptor of an [EventFork] that was read from f: a
// userfaultfd of the new process with f's features. m is marked, so that it is
// adopted once; copies of m are not. If Child fails, the descriptor stays the
// caller's to close. It works after Close too, so that a child whose event was
// read is never lost.
//
// Errors: EINVAL if m is no fork event, or adopted already.
func (f *File) Child(m *Msg) (*File, error) {
	if !supported {
		return nil, refusalUnsupported.error(opChild)
	}
	if f == nil || f.state.Load() == stateNone {
		return nil, refusalInvalid.error(opChild)
	}
	fd, ok := m.Fork()
	if !ok {
		return nil, refusalNotFork.error(opChild)
	}
	child := newFile(fd, f.userModeOnly, f.modeKnown)
	if err := child.adopt(opChild, f.Features()); err != nil {
		return nil, err
	}
	m.adopted()
	return child, nil
}

func newFile(fd int, userModeOnly, modeKnown bool) *File {
	f := &File{fd: fd, userModeOnly: userModeOnly, modeKnown: modeKnown}
	f.state.Store(stateOpen)
	return f
}

// Register has faults of the given modes in r reported to f (UFFDIO_REGISTER,
// Linux 4.3; for the modes see there). The memory is private anonymous, shared
// (memfd, tmpfs, shared anonymous) or hugetlb; with FeatureWPAsync and
// RegisterWP alone almost any. It returns the operations for such a range, more
// or less: the kernel lists IoctlMove for shared memory, where it always fails.
//
// Parts of r where nothing is mapped are passed over in silence. To register
// memory again with fewer modes, Unregister it first: the kernel keeps or
// replaces the modes it has, or refuses.
//
// Errors: EINVAL if nothing is mapped in r, or the memory does not support mode,
// or mode is 0, unknown or RegisterWP with RegisterRWP; EPERM for a shared
// mapping of a file that may not be written; EBUSY if part is registered with
// another userfaultfd, or (Linux 7.3) RegisterWP or RegisterRWP would be
// dropped; ENOMEM if the process has exited, or its mappings cannot be split,
// with part of r registered.
func (f *File) Register(r Range, mode RegisterMode) (Ioctls, error) {
	if err := f.beginRange(opRegister, r); err != nil {
		return 0, err
	}
	defer f.end()
	return f.register(r, mode)
}

// Unregister ends the reports of faults in r and removes its protection
// (UFFDIO_UNREGISTER, Linux 4.3). Parts that are not registered or not mapped
// are passed over. Missing anonymous pages read as zeros from then on.
//
// It wakes all threads that wait in r, with a UFFDIO_WAKE of its own: the kernel
// wakes only those that wait for missing pages, and not even all of them when
// a fault comes at the same moment.
//
// Errors: EINVAL if nothing is mapped in r, or part does not support userfaultfd
// or (Linux 6.17) is registered with another one; ENOMEM if the process has
// exited, or its mappings cannot be split.
func (f *File) Unregister(r Range) error {
	if err := f.beginRange(opUnregister, r); err != nil {
		return err
	}
	defer f.end()
	return f.unregister(r)
}

// Wake wakes the threads that wait on f for pages in r (UFFDIO_WAKE, Linux 4.3):
// no call wakes those that wait on another userfaultfd. They try the access again, and wait again if nothing has changed. r need not be
// registered or even mapped. On hugetlb it must hold the whole huge page.
//
// Errors: those of a malformed range, EINVAL.
func (f *File) Wake(r Range) error {
	if err := f.beginRange(opWake, r); err != nil {
		return err
	}
	defer f.end()
	return f.wake(r)
}

// Copy installs pages at dst with the contents of src, each in one step for
// whoever looks (UFFDIO_COPY, Linux 4.3), and wakes the threads that wait for them
// unless mode has CopyDontWake. src may start anywhere, but is whole pages long.
// n bytes are done; if that is not all, err says why.
//
// With CopyWP the pages are write-protected from the start; without it, the
// protection of a page that does not exist yet is lost.
//
// src is only read, and may be on the stack. Memory that this very process serves
// must not be a source.
//
// Errors: ErrRetry; EEXIST if a page is there already, which wakes nobody
// (hugetlb: on some kernels also if no huge page is free); ENOENT if dst and
// len(src) do not lie within one registered mapping; EFAULT if src cannot be
// read, or dst lies past the end of its file; EINVAL for part of a huge page,
// for CopyWP without RegisterWP, and for a source above 4 GiB if the process
// is a 32-bit one; ENOMEM; ErrGone.
func (f *File) Copy(dst Addr, src []byte, mode CopyMode) (n int64, err error) {
	if err := f.beginRange(opCopy, Range{dst, uint64(len(src))}); err != nil {
		return 0, err
	}
	defer f.end()
	return f.copyPages(dst, src, mode)
}

// ZeroPage installs pages of zeros in r (UFFDIO_ZEROPAGE, Linux 4.3), and wakes
// the threads that wait for them unless mode has ZeroPageDontWake. On private
// memory they take no memory until they are written. n bytes are done; if that is
// not all, err says why.
//
// Errors: ErrRetry; EEXIST if a page is there already, which wakes nobody (also
// for the mark of a write-protected or poisoned page in private memory: Copy
// zeros there); ENOENT if r does not lie within one registered mapping; EINVAL
// on hugetlb; EFAULT past the end of a file; ENOMEM; ErrGone.
func (f *File) ZeroPage(r Range, mode ZeroPageMode) (n int64, err error) {
	if err := f.beginRange(opZeroPage, r); err != nil {
		return 0, err
	}
	defer f.end()
	return f.zeroPage(r, mode)
}

// Continue maps the pages that the file behind r has there already: what
// resolves a fault of RegisterMinor (UFFDIO_CONTINUE, Linux 5.13). It wakes the
// threads that wait unless mode has ContinueDontWake. n bytes are done; if that is
// not all, err says why.
//
// Errors: ErrRetry; EEXIST if a page is mapped already, which wakes nobody;
// EFAULT if the file has no page there; ENOENT if r does not lie within one
// registered mapping; EINVAL on private anonymous memory, past the end of the
// file (EFAULT on some kernels), for part of a huge page, and for ContinueWP
// without RegisterWP; EIO if the page has failed in
// hardware; ENOMEM; ErrGone.
func (f *File) Continue(r Range, mode ContinueMode) (n int64, err error) {
	if err := f.beginRange(opContinue, r); err != nil {
		return 0, err
	}
	defer f.end()
	return f.mapPages(r, mode)
}

// Poison makes accesses to the missing pages of r fail: with SIGBUS, in system
// calls with EFAULT (UFFDIO_POISON, Linux 6.6). It wakes the threads that wait
// unless mode has PoisonDontWake. MADV_DONTNEED removes the poison from
// anonymous memory, and Copy installs a page over it. n bytes are done; if that is
// not all, err says why.
//
// On mips, and for hugetlb memory on arm, who touches a poisoned page is killed by
// a bug of the kernel (seen on Linux 6.12), with locks held: do not use it there.
//
// Errors: ErrRetry; EEXIST if a page or a mark is there already, which wakes
// nobody; ENOENT if r does not lie within one registered mapping; EFAULT past the
// end of a file; EINVAL for part of a huge page, or before Linux 6.6; ErrGone.
func (f *File) Poison(r Range, mode PoisonMode) (n int64, err error) {
	if err := f.beginRange(opPoison, r); err != nil {
		return 0, err
	}
	defer f.end()
	return f.poison(r, mode)
}

// Move moves the pages of src to dst without copying them, and leaves src
// missing (UFFDIO_MOVE, Linux 6.8). It wakes the threads that wait at dst
// unless mode has MoveDontWake. It works in the process that f belongs to and
// nowhere else, from private anonymous memory to the same. The moved pages are
// not write-protected. n bytes are done; if that is not all, err says why.
//
// Kernels since 6.18 (seen on 7.0) now and then move pages that they do not count
// in n, and then say EEXIST of them: these pages are at dst, and nobody was woken.
//
// Errors: ErrRetry; EEXIST if dst has a page already, which wakes nobody; ENOENT
// if src has no page (unless mode has MoveAllowSrcHoles), or either range is not
// mapped; EBUSY if a source page is pinned, merged, or shared with a forked child;
// EINVAL in another process, for other memory, for a range that lies in several
// mappings, for mappings that differ in protection or locking, if dst is not
// registered with f, or before Linux 6.8; EFAULT if a source page is poisoned.
func (f *File) Move(dst Addr, src Range, mode MoveMode) (n int64, err error) {
	if err := f.beginRange(opMove, src); err != nil {
		return 0, err
	}
	defer f.end()
	switch (Range{dst, src.Len}).check() {
	case refusalStart:
		return 0, refusalMoveDst.error(opMove)
	case refusalOverflow:
		return 0, refusalMoveOverflow.error(opMove)
	}
	return f.move(dst, src, mode)
}

// WriteProtect protects the pages of r from writing, with WriteProtectWP, or
// lifts the protection and, unless mode is WriteProtectDontWake, wakes the threads
// that wait (UFFDIO_WRITEPROTECT, Linux 5.7). r may span mappings, and what is not
// mapped is passed over, from Linux 6.4 on. Pages of private anonymous
// memory that do not exist are passed over unless FeatureWPUnpopulated is
// enabled: their first write goes unnoticed.
//
// Errors: ErrRetry, with nothing done; ENOENT if part of r is not registered
// with RegisterWP, with what comes before it changed; EINVAL for part of a huge
// page, for both modes together, or before Linux 5.7; ErrGone.
func (f *File) WriteProtect(r Range, mode WriteProtectMode) error {
	if err := f.beginRange(opWriteProtect, r); err != nil {
		return err
	}
	defer f.end()
	return f.writeProtect(r, mode)
}

// RWProtect protects the pages of r from every access, with RWProtectRWP, or
// lifts the protection and, unless mode is RWProtectDontWake, wakes the threads
// that wait (UFFDIO_RWPROTECT, Linux 7.3). Pages that do not exist are passed over, and are not protected when
// they come.
//
// Errors: ErrRetry, with nothing done; ENOENT if part of r is not registered
// with RegisterRWP, or nothing is mapped, with nothing changed; EINVAL for part
// of a huge page, for both modes together, or before Linux 7.3; ErrGone.
func (f *File) RWProtect(r Range, mode RWProtectMode) error {
	if err := f.beginRange(opRWProtect, r); err != nil {
		return err
	}
	defer f.end()
	return f.rwProtect(r, mode)
}

// SetMode switches features while memory is registered (UFFDIO_SET_MODE, Linux
// 7.3): FeatureRWPAsync, and no other. Faults under way are finished first.
// Enabling wakes all threads that wait on f, also those that wait for missing
// pages; they fault again.
//
// Errors: EINVAL if a feature cannot be switched, or is in both sets, or
// FeatureRWP is not enabled, or before Linux 7.3.
func (f *File) SetMode(enable, disable Features) error {
	if err := f.begin(opSetMode); err != nil {
		return err
	}
	defer f.end()
	return f.setMode(enable, disable)
}

// ReadMsg waits for a message and returns it (read(2), Linux 4.3): it is
// [File.ReadMsgs] for one, with the same errors.
func (f *File) ReadMsg() (Msg, error) {
	var one [1]Msg
	_, err := f.ReadMsgs(one[:])
	return one[0], err
}

// ReadMsgs waits until there is a message, and reads as many as there are, up to
// len(msgs), without waiting for more (read(2), Linux 4.3). A deadline or Close
// ends the wait; a goroutine that waits holds no thread. But for the first wait,
// which hands the descriptor to Go's poller, it does not allocate.
//
// From that wait on, each fault wakes a thread of this process, until Close, also
// if another process reads the message; that makes the fault take about twice as
// long. A process that only holds the descriptor should never read from it.
//
// A message is handed out once. All faults that wait come before all events,
// whatever happened first: handle the events of a batch before its faults. A
// fork event brings a descriptor: see [Msg.Fork].
//
// Concurrent readers take turns.
//
// Errors: [os.ErrDeadlineExceeded]; [os.ErrClosed]; EINVAL if msgs is empty;
// EMFILE if the process has no descriptor free for a fork event, which stays
// queued.
func (f *File) ReadMsgs(msgs []Msg) (n int, err error) {
	if err := f.ready(opReadMsg); err != nil {
		return 0, err
	}
	if len(msgs) == 0 {
		return 0, refusalNoBuffer.error(opReadMsg)
	}
	return f.readMsgs(msgs)
}

// SetReadDeadline sets the time at which ReadMsg and ReadMsgs give up with
// [os.ErrDeadlineExceeded], also those that wait already. The zero time means
// never.
func (f *File) SetReadDeadline(t time.Time) error {
	if err := f.begin(opSetReadDeadline); err != nil {
		return err
	}
	defer f.end()
	f.deadline.Lock()
	defer f.deadline.Unlock()
	if p := f.poller.Load(); p != nil {
		if err := p.file.SetReadDeadline(t); err != nil {
			return &Error{Op: opNames[opSetReadDeadline], Err: err}
		}
	}
	f.deadline.set(t)
	return nil
}

// joinPoller returns the poller, which f joins if nobody has waited before.
func (f *File) joinPoller(op op) (*poller, error) {
	if p := f.poller.Load(); p != nil {
		return p, nil
	}
	if err := f.begin(op); err != nil {
		return nil, err
	}
	defer f.end()
	f.deadline.Lock()
	defer f.deadline.Unlock()
	if p := f.poller.Load(); p != nil {
		return p, nil
	}
	p, err := f.startPolling(op)
	if err != nil {
		return nil, err
	}
	if t := f.deadline.time(); !t.IsZero() {
		if err := p.file.SetReadDeadline(t); err != nil {
			return nil, &Error{Op: opNames[op], Err: err}
		}
	}
	f.poller.Store(p)
	if f.state.Load() != stateReady { // Close may not have seen it
		return nil, refusalClosed.error(op)
	}
	return p, nil
}

// A deadline is that of the poller, for who reads without it.
type deadline struct {
	sync.Mutex              // the two change together
	at         atomic.Int64 // since epoch, in nanoseconds; 0 is none
}

var epoch = time.Now()

func (d *deadline) time() time.Time {
	at := d.at.Load()
	if at == 0 {
		return time.Time{}
	}
	return epoch.Add(time.Duration(at))
}

func (d *deadline) set(t time.Time) {
	if t.IsZero() {
		d.at.Store(0)
	} else {
		d.at.Store(deadlineAt(time.Since(epoch), time.Until(t)))
	}
}

// deadlineAt is the time of something that is so far away from now. Like the
// poller, it goes by the monotonic clock from now on, however the time was given.
func deadlineAt(now, left time.Duration) int64 {
	if left > math.MaxInt64-now {
		return math.MaxInt64
	}
	return max(1, int64(now+left))
}

func (d *deadline) over() bool {
	at := d.at.Load()
	return at != 0 && int64(time.Since(epoch)) >= at
}

// SyscallConn gives access to the descriptor, to pass it to another process or
// to use it in ways that this package lacks. The descriptor is valid, and stays
// open, during the calls of the [syscall.RawConn]. Its Read waits like ReadMsgs;
// its Write fails.
func (f *File) SyscallConn() (syscall.RawConn, error) {
	if err := f.ready(opSyscallConn); err != nil {
		return nil, err
	}
	return rawConn{f}, nil
}

// Close closes the descriptor. It ends the wait of readers, waits for calls that
// are under way, and makes later ones fail with [os.ErrClosed]. A call under way
// that waits itself, because its source or the process does, holds Close up.
//
// If no other process or descriptor holds the userfaultfd, all memory is
// unregistered, its protection removed, and all waiting threads are woken:
// missing anonymous pages read as zeros from now on. To end well, install all
// pages first, or Unregister what is complete and Poison what is not.
func (f *File) Close() error {
	if !supported {
		return refusalUnsupported.error(opClose)
	}
	if f == nil || f.state.Load() == stateNone {
		return refusalInvalid.error(opClose)
	}
	switch f.state.Swap(stateClosed) {
	case stateClosed:
		return refusalClosed.error(opClose)
	case stateReady:
		if p := f.poller.Load(); p != nil {
			p.file.SetReadDeadline(time.Unix(1, 0)) // readers need not wait for other calls
		}
	}
	f.calls.Lock()
	defer f.calls.Unlock()
	return f.close()
}
