// Package lazymem is memory in one's own process that fills itself from a source
// when it is touched: any [io.ReaderAt] as a []byte, of which only those pages
// are ever read that somebody looks at.
//
//	src := source.FromReaderAt(file, size) // or OpenFile, Layer, …
//	m, err := lazymem.New(src, nil)
//	if err != nil {
//		return err
//	}
//	defer m.Close()
//
//	var at int
//	err = m.Do(func(mem []byte) error {
//		at = bytes.Index(mem, []byte("needle"))
//		return nil
//	})
//
// No second thread serves the faults: a goroutine that touches a missing page
// gets a SIGBUS ([uffd.FeatureSigbus]), which [Memory.Do] recovers from; it
// reads the source itself, installs the page, and runs the function again. So
// nothing waits for anything that the Go scheduler would have to run: see
// Deadlocks below. It needs no privilege, and Linux 5.11; with privilege, or
// vm.unprivileged_userfaultfd=1, Linux 4.14.
//
// [Memory.ReadAt] and [Memory.WriteAt] copy, and are the simplest way in. Do is
// for code that wants a slice. [Memory.Populate] fills in advance, and when all
// is there, [Memory.Bytes] is a slice without conditions.
//
// # The function of Do runs many times
//
// It is started again from its beginning after each fault, and so has to be
// idempotent: only its last run counts, so it has to forget what an earlier one
// did. This counts lines several times over:
//
//	lines := 0
//	err := m.Do(func(mem []byte) error {
//		for _, b := range mem { // wrong: lines keeps what earlier runs counted
//			if b == '\n' {
//				lines++
//			}
//		}
//		return nil
//	})
//
// and this is right:
//
//	var lines int
//	err := m.Do(func(mem []byte) error {
//		lines = bytes.Count(mem, []byte("\n"))
//		return nil
//	})
//
// What the function writes to the memory stays as well, so that it must not depend
// on what was there before:
//
//	err := m.Do(func(mem []byte) error {
//		for i := range mem {
//			mem[i] ^= key // wrong: what lies before a fault is changed once more
//		}
//		return nil
//	})
//
// Populate that part first, or read, compute and write it with ReadAt and WriteAt.
// Printing, appending to a slice outside, sending to a channel: after Do, not in
// it. A [sync.Once] counts a run that faulted as done.
//
// A function that goes through the memory from front to back makes Do read
// ahead, twice as much each time, so that it is started some fifteen times for a
// gigabyte, and at most as much again is read as it has seen. A function that
// jumps around in a lot of memory does better with one Do for each jump.
//
// # What Do cannot protect
//
// A fault is a panic that goes up to Do. That has consequences.
//
// Locks have to be released by defer. Here the second run waits for ever:
//
//	m.Do(func(mem []byte) error {
//		mu.Lock()
//		sum += int(mem[i]) // may fault: Unlock is not reached
//		mu.Unlock()
//		return nil
//	})
//
// Goroutines started inside are not protected (iter.Pull starts one, too), and a
// fault in one ends the program ("unexpected fault address"):
//
//	m.Do(func(mem []byte) error {
//		go work(mem) // fatal; let work call Do itself
//		return nil
//	})
//
// The slice is good until the function returns. Kept, it ends the program at the
// next fault, or when it is used after Close; and when the Memory is closed and
// nobody holds it any more, other memory may lie at these addresses:
//
//	var kept []byte
//	m.Do(func(mem []byte) error { kept = mem[:100]; return nil }) // bytes.Clone it instead
//	fmt.Println(kept[0])
//
// That includes strings and slices that point into it, such as what
// [regexp.Regexp.Find] returns, also as keys of a map.
//
// A recover inside that does not panic again swallows the fault. fmt has one
// around each String method:
//
//	m.Do(func(mem []byte) error {
//		s = fmt.Sprint(header(mem)) // header.String() reads mem: "%!v(PANIC=…"
//		return nil
//	})
//
// That is found out, and Do returns an error that is [ErrSwallowed]. What is not
// found out: a function that swallows a fault and after it, in the same run,
// another memory fault, such as that of a nil pointer.
//
// System calls fail with EFAULT on pages that are missing, because no signal is
// raised for them: os.File.Write of part of mem, for example. Populate that part
// first.
//
// The runtime cannot panic while it holds a lock, and ends the program ("unexpected
// signal during runtime execution"): when a string in the memory is printed by
// print or println, or given to panic, and, as the compiler pleases, when an
// element is sent to a channel:
//
//	m.Do(func(mem []byte) error {
//		ch <- mem[i] // may be fatal; b := mem[i] first, and send after Do
//		return nil
//	})
//
// Inside Do, as with [debug.SetPanicOnFault], a fault in other memory is a
// panic too. It passes through Do as it is, as do all other panics.
//
// # Deadlocks
//
// A goroutine that waits for a handler of its own process keeps its P, and cannot
// be stopped in assembly code (see package uffd). What that means was measured
// with 16 goroutines that fault in all sorts of code, while one goroutine runs
// the collector in a loop, or runtime.ReadMemStats, or the source allocates 2 MiB
// in each read, or none of that (Linux 6.18, 2 CPUs; docs/deadlocks.md has every
// cell, and the command that makes it). A hang is a round over 64 pages that takes
// more than 4 s:
//
//	                                            handler goroutine   lazymem
//	GOMAXPROCS                                  1      2      4     1, 2, 4
//
//	copy, bytes.Equal, map, sha256, regexp      hang   hang   hang  ok
//	slices.Sort, encoding/binary                hang   hang   some  ok
//	                                                          hang
//	plain loads and stores                      hang   most   ok    ok
//	                                                   hang
//
// lazymem is the same with GODEBUG=asyncpreemptoff=1, and under the race
// detector.
//
// # Memory
//
// Pages come one by one, so transparent huge pages do not; Config.PageSize asks
// for real ones. What the kernel does behind the scenes — swapping, merging equal
// pages (KSM), making huge pages of full regions — does no harm. Calls that
// change the mapping from outside, such as madvise(MADV_DONTNEED) on the slice,
// are found out as [ErrLost] where contents went missing. A child process that is
// forked without exec does not have the memory. A debugger stops at each fault,
// for it is a signal: tell it to pass SIGBUS on.
package lazymem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

// Config says what [New] makes. The zero Config is private memory in pages of
// the system's size.
type Config struct {
	// Shared has the memory in a memfd, which other processes can map when it is
	// full: see [Memory.File].
	Shared bool

	// PageSize is the size of pages; 0 means the system's. Another size, such as
	// 2 << 20, means huge pages, which the administrator has to have reserved
	// (vm.nr_hugepages).
	PageSize int

	// Window is how many bytes are read at least when a page is missing: the
	// pages around it, aligned. 0 means 64 KiB, 1 the page alone. It is rounded
	// up to whole pages.
	Window int
}

const defaultWindow = 64 << 10

// chunkBytes is how much is read from the source at once, if the window is not
// larger.
const chunkBytes = 1 << 20

var (
	// ErrSwallowed matches the error of Do when its function returned though a
	// fault had stopped it half-way: something in between recovered from the
	// panic. What the function computed is not to be trusted.
	ErrSwallowed = errors.New("a recover inside the function swallowed a page fault")

	// ErrIncomplete is the answer of Bytes and File while pages are missing.
	ErrIncomplete = errors.New("lazymem: not all of the memory is filled: call Populate first")

	// ErrLost matches the error of a call that finds a page missing which had
	// been there: discarded behind lazymem's back, by madvise or the like, or
	// failed in hardware. Its contents may have been changed since it was read
	// from the source, so it is not read again until Discard says so.
	ErrLost = errors.New("the page was there and is gone: discarded from outside, or failed in hardware")

	errCircle  = errors.New("the source reads the very memory that it fills")
	errOverlap = errors.New("lazymem: the bytes to copy overlap the memory that they are copied to: copy them by way of a buffer")
	errPinned  = errors.New("lazymem: Bytes or File has handed out the memory: it cannot be discarded any more")
)

// Error is a page that is not there when it is needed. Err is the source's, or
// one of uffd, or one of this package. The page stays missing, and the next
// access tries again.
type Error struct {
	Off int64 // where the page begins, or the access was
	Err error
}

func (e *Error) Error() string { return fmt.Sprintf("lazymem: offset %d: %v", e.Off, e.Err) }

// Unwrap returns the reason.
func (e *Error) Unwrap() error { return e.Err }

// Range is Len bytes from offset Off on.
type Range struct{ Off, Len int64 }

// Memory is memory that fills itself. All methods are safe for concurrent use,
// also inside the function of Do, and of other Memories; a source may read from
// another Memory, but not from the one it fills.
//
// Goroutines that miss the same page cause one read of the source. If it fails,
// all that wait for this page get the error; who comes later tries again. If it
// panics, the goroutine that reads does, and another one that waits tries.
//
// Writes change the memory, never the source.
type Memory struct {
	src  source.Source
	file *uffd.File
	mem  []byte   // the mapping
	fd   *os.File // the memfd, nil if the memory is private

	base      uintptr // the address of mem
	size      int     // of the source
	pageSize  int
	pageShift int // log2 of that
	pages     int
	window    int // in pages
	chunk     int // in pages

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	closed atomic.Bool

	present []atomic.Uint64 // a bit for each page; set and cleared under mu

	mu       sync.Mutex
	ended    sync.Cond // a fill has ended, or the memory is closed
	fills    []*fill   // under way
	idle     []*fill   // for later
	missing  int       // pages
	discards uint64    // how often Discard has succeeded
	pinned   bool      // the memory was handed out: it stays full
}

var (
	_ io.ReaderAt = (*Memory)(nil)
	_ io.WriterAt = (*Memory)(nil)
)

// New maps src as memory. Nothing is read yet.
//
// Errors: [*uffd.OpenError] if no userfaultfd can be opened;
// [*uffd.FeatureError] before Linux 4.14; ENOMEM if there is no address space or
// are no huge pages; EINVAL if the kernel does not have this page size, ENODEV
// if the memory is shared;
// [errors.ErrUnsupported] outside of Linux, and with a release of Go whose runtime
// hides where a goroutine has faulted, which finding swallowed faults depends on.
func New(src source.Source, c *Config) (*Memory, error) {
	if c == nil {
		c = new(Config)
	}
	pageSize := c.PageSize
	if pageSize == 0 {
		pageSize = os.Getpagesize()
	}
	size := src.Size()
	switch {
	case size <= 0:
		return nil, fmt.Errorf("lazymem: the source has a size of %d: there is nothing to map", size)
	case pageSize < os.Getpagesize() || bits.OnesCount(uint(pageSize)) != 1:
		return nil, fmt.Errorf("lazymem: Config.PageSize is %d: it has to be a power of two, and at least %d",
			pageSize, os.Getpagesize())
	case c.Window < 0:
		return nil, fmt.Errorf("lazymem: Config.Window is %d: it cannot be negative", c.Window)
	case uint64(size) > uint64(maxInt-pageSize):
		return nil, fmt.Errorf("lazymem: the source has a size of %d: that does not fit into memory", size)
	}
	m := &Memory{src: src, size: int(size), pageSize: pageSize, pageShift: bits.TrailingZeros(uint(pageSize))}
	m.pages = m.pagesIn(m.size)
	m.window = c.Window
	if m.window == 0 {
		m.window = defaultWindow
	}
	m.window = m.pagesIn(min(m.window, m.size))
	m.chunk = max(m.window, chunkBytes>>m.pageShift)
	m.missing = m.pages
	m.present = make([]atomic.Uint64, (m.pages+63)/64)
	m.ended.L = &m.mu
	if err := m.open(c.Shared); err != nil {
		return nil, err
	}
	m.base = uintptr(unsafe.Pointer(unsafe.SliceData(m.mem)))
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m, nil
}

const maxInt = int(^uint(0) >> 1)

// Size returns the size of the source.
func (m *Memory) Size() int64 { return int64(m.size) }

// Close gives the memory back: further calls fail with [os.ErrClosed], and so do
// those under way at their next access, functions of Do included. It waits for
// reads of the source by other goroutines, whose context ends; after that the
// source is not used any more. It can be called inside Do.
//
// What Bytes returned must not be touched any more: that ends the program. The
// addresses are not used for anything else while somebody is inside, or holds
// the Memory.
//
// Nothing but Close gives the memory back.
func (m *Memory) Close() error {
	if !m.closed.CompareAndSwap(false, true) {
		return os.ErrClosed
	}
	m.cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended.Broadcast()
	for m.othersFill() {
		m.ended.Wait()
	}
	return m.unmap()
}

// Do calls f with the memory. When f touches a page that is missing, Do fills it
// and calls f again from its beginning: see the package's documentation for what
// that asks of f.
//
// Do returns what the last call of f returned. If a page cannot be filled, it
// returns an [*Error] instead.
func (m *Memory) Do(f func(mem []byte) error) error {
	if m.closed.Load() {
		return os.ErrClosed
	}
	return m.run(f)
}

// Scalar is what memory can be seen as: fixed-size numbers, for which any bytes
// are valid.
type Scalar interface {
	~int8 | ~int16 | ~int32 | ~int64 | ~uint8 | ~uint16 | ~uint32 | ~uint64 |
		~float32 | ~float64 | ~complex64 | ~complex128
}

// DoAs is [Memory.Do] with the memory as numbers in the machine's byte order. If
// the size is not a multiple of T's, the last bytes are left out.
func DoAs[T Scalar](m *Memory, f func(s []T) error) error {
	return m.Do(func(mem []byte) error {
		var t T
		n := len(mem) / int(unsafe.Sizeof(t))
		return f(unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(mem))), n))
	})
}

// ReadAt copies from the memory: see [io.ReaderAt]. What it needs is filled
// before it copies, so that nothing is done twice. p may be a part of the memory
// itself if it does not overlap what is read.
func (m *Memory) ReadAt(p []byte, off int64) (n int, err error) {
	n, err = m.prepare(p, off)
	if n > 0 {
		if fault := m.copy(p[:n], off, false); fault != nil {
			return 0, fault
		}
	}
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// WriteAt copies to the memory: see [io.WriterAt]. The pages it writes to are
// filled first. It does not write behind the end. p may be a part of the memory
// itself if it does not overlap what is written.
func (m *Memory) WriteAt(p []byte, off int64) (n int, err error) {
	n, err = m.prepare(p, off)
	if n > 0 {
		if fault := m.copy(p[:n], off, true); fault != nil {
			return 0, fault
		}
	}
	if err == nil && n < len(p) {
		err = fmt.Errorf("lazymem: WriteAt: the memory ends at %d: %w", m.size, io.ErrShortWrite)
	}
	return n, err
}

// prepare fills what a copy between p and off needs. It returns how many bytes can
// be copied, and why not more; behind the end there are none.
func (m *Memory) prepare(p []byte, off int64) (int, error) {
	switch {
	case m.closed.Load():
		return 0, os.ErrClosed
	case off < 0:
		return 0, fmt.Errorf("lazymem: negative offset %d", off)
	case off >= m.Size():
		return 0, nil
	}
	start := int(off)
	n := min(len(p), m.size-start)
	at := m.offset(uintptr(unsafe.Pointer(unsafe.SliceData(p))))
	if at >= 0 && at < start+n && start < at+n {
		return 0, errOverlap // p may be missing too, and the copy start again half-way
	}
	last := m.pagesIn(start + n)
	for page := start >> m.pageShift; page < last; page++ {
		if m.has(page) {
			continue
		}
		if _, _, err := m.fill(m.ctx, page, last); err != nil {
			return max(0, page<<m.pageShift-start), err
		}
	}
	return n, nil
}

// Populate fills the length bytes from off on in advance, in one goroutine. If
// progress is not nil, it is called after each step with the number of bytes
// that are there, from off on.
func (m *Memory) Populate(ctx context.Context, off, length int64, progress func(filled int64)) error {
	first, last, err := m.span(off, length)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)()
	for page := first; page < last; {
		end, _, err := m.fill(ctx, page, last)
		if err != nil {
			return err
		}
		page = m.skipPresent(end, last)
		if progress != nil {
			progress(min(int64(page)<<m.pageShift-off, length))
		}
	}
	return nil
}

// Bytes returns the memory once all of it is filled; before that it fails with
// [ErrIncomplete]. The slice is ordinary memory, for goroutines and system calls
// too, until Close. Discard fails from now on.
func (m *Memory) Bytes() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.pin(); err != nil {
		return nil, err
	}
	return m.mem[:m.size:m.size], nil
}

// File returns a new descriptor of the memfd behind shared memory once all of it
// is filled, for other processes to map; before that it fails with
// [ErrIncomplete]. Discard fails from now on. The file's size cannot be changed;
// pages that a holder of it takes out (fallocate(2) with FALLOC_FL_PUNCH_HOLE)
// are [ErrLost] here, and zeros there.
func (m *Memory) File() (*os.File, error) {
	if m.fd == nil {
		return nil, errors.New("lazymem: File: the memory is private: set Config.Shared")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.pin(); err != nil {
		return nil, err
	}
	return m.dup()
}

// pin has the memory stay full.
func (m *Memory) pin() error {
	switch {
	case m.closed.Load():
		return os.ErrClosed
	case m.missing > 0:
		return ErrIncomplete
	}
	m.pinned = true
	return nil
}

// Resident returns what is filled.
func (m *Memory) Resident() []Range {
	var list []Range
	for page := 0; page < m.pages; page++ {
		if !m.has(page) {
			continue
		}
		end := m.skipPresent(page+1, m.pages)
		off := int64(page) << m.pageShift
		list = append(list, Range{off, min(int64(end)<<m.pageShift, m.Size()) - off})
		page = end
	}
	return list
}

// Discard empties the pages that lie wholly within the length bytes from off on,
// so that they are read from the source again when they are touched. What has
// been written to them is lost. It waits for reads of the source that are under
// way for these pages.
//
// Errors: EINVAL if the memory is locked (mlock(2), mlockall(2)), and for private
// huge pages before Linux 5.18.
func (m *Memory) Discard(off, length int64) error {
	if _, _, err := m.span(off, length); err != nil {
		return err
	}
	first, last := m.pagesIn(int(off)), int(off+length)>>m.pageShift
	if off+length == m.Size() {
		last = m.pages
	}
	if first >= last {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		f := m.filling(first, last)
		if f == nil {
			break
		}
		if f.goroutine == getg() {
			return errCircle
		}
		m.ended.Wait()
	}
	switch {
	case m.closed.Load():
		return os.ErrClosed
	case m.pinned:
		return errPinned
	}
	if err := m.discard(m.mem[first<<m.pageShift : last<<m.pageShift]); err != nil {
		return fmt.Errorf("lazymem: Discard: %w", err)
	}
	m.discards++
	for page := first; page < last; page++ {
		if m.has(page) {
			m.present[page/64].And(^(1 << (page % 64)))
			m.missing++
		}
	}
	return nil
}

// span returns the pages that the range lies in.
func (m *Memory) span(off, length int64) (first, last int, err error) {
	if m.closed.Load() {
		return 0, 0, os.ErrClosed
	}
	if off < 0 || length < 0 || off > m.Size() || length > m.Size()-off {
		return 0, 0, fmt.Errorf("lazymem: the %d bytes at %d do not lie within the memory's %d", length, off, m.size)
	}
	if length == 0 {
		return 0, 0, nil
	}
	return int(off) >> m.pageShift, m.pagesIn(int(off + length)), nil
}

// has reports whether the page is there.
func (m *Memory) has(page int) bool {
	return m.present[page/64].Load()&(1<<(page%64)) != 0
}

// skipPresent returns the first page from page on that is missing, or last.
func (m *Memory) skipPresent(page, last int) int {
	for page < last && m.has(page) {
		page++
	}
	return page
}
