package uffd

import (
	"encoding/binary"
	"fmt"
)

// Event is the kind of a message (UFFD_EVENT_*).
type Event uint8

// The events of Linux 7.3. All but EventPagefault block the thread that causes
// them until the message is read, and while one is unread all calls that
// install or protect pages fail with [ErrRetry].
const (
	EventPagefault Event = 0x12 // a thread waits for a page
	EventFork      Event = 0x13 // the process forked (needs FeatureEventFork)
	EventRemap     Event = 0x14 // memory was moved by mremap(2) (needs FeatureEventRemap)
	EventRemove    Event = 0x15 // pages are about to be discarded by madvise(2) (needs FeatureEventRemove)
	EventUnmap     Event = 0x16 // memory was unmapped (needs FeatureEventUnmap)
)

// String returns the event's name, like "pagefault", and "event 0x17" for one
// that this package does not know.
func (e Event) String() string {
	switch e {
	case EventPagefault:
		return "pagefault"
	case EventFork:
		return "fork"
	case EventRemap:
		return "remap"
	case EventRemove:
		return "remove"
	case EventUnmap:
		return "unmap"
	}
	return fmt.Sprintf("event %#x", uint8(e))
}

// Msg is a message of the kernel: the 32 bytes of struct uffd_msg. Its methods
// decode it; each answers false for an event of another kind.
//
// A message of kind [EventFork] comes with an open descriptor that belongs to
// whoever read the message: see [Msg.Fork].
type Msg struct {
	raw [msgSize]byte
}

const msgSize = 32

// Offsets in struct uffd_msg. Those of the union begin at 8.
const (
	msgEvent = 0

	pagefaultFlags    = 8
	pagefaultAddress  = 16
	pagefaultThreadID = 24

	forkFD = 8

	remapFrom = 8
	remapTo   = 16
	remapLen  = 24

	removeStart = 8
	removeEnd   = 16
)

func (m *Msg) u64(offset int) uint64 { return binary.NativeEndian.Uint64(m.raw[offset:]) }
func (m *Msg) u32(offset int) uint32 { return binary.NativeEndian.Uint32(m.raw[offset:]) }

// Event returns the kind of the message.
func (m *Msg) Event() Event { return Event(m.raw[msgEvent]) }

// Pagefault is an access that waits to be resolved.
//
// One access can be reported more than once: a signal that interrupts the wait,
// a Wake without a page, and several threads on one page each make a message
// of their own.
type Pagefault struct {
	// Addr is the address that was accessed, rounded down to its page (on
	// hugetlb to its huge page) unless FeatureExactAddress is enabled.
	Addr Addr
	// Flags is the reason. None of WP, Minor and RWP: the page is missing.
	Flags PagefaultFlags
	// ThreadID is the faulting thread as seen in its own PID namespace; 0
	// unless FeatureThreadID is enabled.
	ThreadID uint32
}

// Pagefault decodes an [EventPagefault].
func (m *Msg) Pagefault() (Pagefault, bool) {
	if m.Event() != EventPagefault {
		return Pagefault{}, false
	}
	return Pagefault{
		Addr:     Addr(m.u64(pagefaultAddress)),
		Flags:    PagefaultFlags(m.u64(pagefaultFlags)),
		ThreadID: m.u32(pagefaultThreadID),
	}, true
}

// Fork decodes an [EventFork]. The kernel has installed fd, a userfaultfd of
// the new process, in the process that read the message: pass the message to
// [File.Child], or close fd, or it leaks and keeps the child's memory
// registered. A message that Child has adopted answers false.
func (m *Msg) Fork() (fd int, ok bool) {
	if m.Event() != EventFork {
		return -1, false
	}
	fd = int(int32(m.u32(forkFD)))
	if fd < 0 {
		return -1, false
	}
	return fd, true
}

// adopted marks the descriptor of an EventFork as taken.
func (m *Msg) adopted() { binary.NativeEndian.PutUint32(m.raw[forkFD:], ^uint32(0)) }

// Remap is a move of registered memory by mremap(2): the Len bytes that were at
// From are now at To. Memory that grew in the move is registered too, but not
// counted in Len.
type Remap struct {
	From, To Addr
	Len      uint64
}

// Remap decodes an [EventRemap].
func (m *Msg) Remap() (Remap, bool) {
	if m.Event() != EventRemap {
		return Remap{}, false
	}
	return Remap{
		From: Addr(m.u64(remapFrom)),
		To:   Addr(m.u64(remapTo)),
		Len:  m.u64(remapLen),
	}, true
}

// Remove decodes an [EventRemove]: the pages of the range are about to be
// discarded, and will be missing again. The discard runs on once the message
// has been read, so pages installed just after may be discarded with the rest.
func (m *Msg) Remove() (Range, bool) { return m.removed(EventRemove) }

// Unmap decodes an [EventUnmap]: the range was unmapped. Another mapping may
// be there already.
func (m *Msg) Unmap() (Range, bool) { return m.removed(EventUnmap) }

func (m *Msg) removed(e Event) (Range, bool) {
	if m.Event() != e {
		return Range{}, false
	}
	start, end := m.u64(removeStart), m.u64(removeEnd)
	return Range{Addr(start), end - min(start, end)}, true
}

// String formats the message for logs, like "pagefault 0x7f0000001000 WRITE"
// or "remove [0x7f0000000000, 0x7f0000004000)".
func (m *Msg) String() string {
	switch e := m.Event(); e {
	case EventPagefault:
		p, _ := m.Pagefault()
		s := fmt.Sprintf("%v %v", e, p.Addr)
		if p.Flags != 0 {
			s += " " + p.Flags.String()
		}
		if p.ThreadID != 0 {
			s += fmt.Sprintf(" thread %d", p.ThreadID)
		}
		return s
	case EventFork:
		if fd, ok := m.Fork(); ok {
			return fmt.Sprintf("%v fd %d", e, fd)
		}
		return e.String() + " adopted"
	case EventRemap:
		r, _ := m.Remap()
		return fmt.Sprintf("%v %v to %v length %#x", e, r.From, r.To, r.Len)
	case EventRemove, EventUnmap:
		r, _ := m.removed(e)
		return fmt.Sprintf("%v %v", e, r)
	default:
		return e.String()
	}
}
