// Package handoff passes userfaultfds from the process whose memory faults to
// the one that serves the faults, over unix sockets.
//
// [Send] and [Receive] pass a userfaultfd with a few bytes of the caller's own.
// [ReceiveFirecracker] takes what Firecracker sends when it restores a snapshot
// with a memory backend of type Uffd:
//
//	conn, err := listener.AcceptUnix()
//	...
//	file, regions, err := handoff.ReceiveFirecracker(ctx, conn, image.Size())
//	...
//	peer, err := handoff.OpenPeer(conn)
//
// The regions have the fields of package pager's, and the peer, or on most
// versions the connection, tells when the process is gone.
//
// # Waiting
//
// Every call that waits ends when its context does, and also at the deadline of
// the connection, if that has one. A peer can take its time to send a message,
// so give either. A context that ends during a call clears the deadline.
//
// A connection on which a call has failed may be in the middle of a message:
// close it.
//
// # Descriptors
//
// Whoever connects can send any descriptor. One is wanted, the first, and it has
// to be a userfaultfd; the others are closed, and so is everything if a call
// fails. All are close-on-exec from the start.
//
// The package compiles everywhere. Outside of Linux every call returns an error
// that is [errors.ErrUnsupported].
package handoff

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"

	"github.com/go-uffd/uffd"
)

// A Region is memory of the process that sent its userfaultfd.
type Region struct {
	// Range is the memory, in whole pages.
	Range uffd.Range
	// Offset is where the contents of the first page are in the memory file.
	Offset int64
	// PageSize is the size of the memory's pages in bytes; 0 means the system's.
	PageSize int
}

// MessageError reports a peer that sent something else than it should have.
type MessageError struct {
	Err error // what is wrong with it
}

func (e *MessageError) Error() string { return "handoff: bad message: " + e.Err.Error() }

// Unwrap returns what is wrong.
func (e *MessageError) Unwrap() error { return e.Err }

// Send sends data, which must not be empty, with a duplicate of f. The caller
// keeps f.
func Send(ctx context.Context, conn *net.UnixConn, f *uffd.File, data []byte) error {
	if len(data) == 0 {
		return errors.New("handoff: sending: a userfaultfd needs at least one byte to go with")
	}
	if err := send(ctx, conn, f, data); err != nil {
		return fmt.Errorf("handoff: sending: %w", err)
	}
	return nil
}

// Receive fills data, which must not be empty, and returns the userfaultfd that
// came with it. It reads no further, however the peer divides what it sends.
//
// Errors: [*MessageError] if no userfaultfd came; [io.ErrUnexpectedEOF] if the
// peer hung up; [os.ErrDeadlineExceeded]; the cause of ctx.
func Receive(ctx context.Context, conn *net.UnixConn, data []byte) (*uffd.File, error) {
	if len(data) == 0 {
		return nil, errors.New("handoff: receiving: a userfaultfd needs at least one byte to come with")
	}
	return receive(ctx, conn, true, func(r io.Reader) error {
		_, err := io.ReadFull(r, data)
		return err
	})
}

// PeerPid returns the pid of the process that connected, or listened, at the
// other end (SO_PEERCRED), which may have exited since. Of a pair of sockets it is
// who made the pair.
func PeerPid(conn *net.UnixConn) (int, error) { return peerPid(conn) }

// OpenPeer returns a pidfd of the process of [PeerPid], which becomes readable when
// that exits (SO_PEERPIDFD, Linux 6.5). Before that, it is found by its pid
// (pidfd_open(2), Linux 5.3): a process that has exited, and whose pid was given
// to another, is then mistaken for that.
//
// Errors: [os.ErrProcessDone] if the process has exited already; it may be
// noticed only by the pidfd.
func OpenPeer(conn *net.UnixConn) (*os.File, error) { return openPeer(conn) }

// Limits of what a peer may send.
const (
	maxMessage = 1 << 20 // bytes
	maxRegions = 4096
	maxPage    = 1 << 30
)

// checkRegions finds what makes regions useless, or dangerous: whoever serves
// them computes with these numbers.
func checkRegions(regions []Region, memorySize int64) error {
	if len(regions) == 0 {
		return errors.New("it has no regions")
	}
	if len(regions) > maxRegions {
		return fmt.Errorf("it has more than %d regions", maxRegions)
	}
	for i, r := range regions {
		if err := r.check(memorySize); err != nil {
			return fmt.Errorf("region %d, %v: %w", i, r.Range, err)
		}
	}
	byAddress := slices.SortedFunc(slices.Values(regions), func(a, b Region) int {
		return cmp.Compare(a.Range.Start, b.Range.Start)
	})
	for i, r := range byAddress[1:] {
		if before := byAddress[i].Range; r.Range.Start < before.End() {
			return fmt.Errorf("the regions %v and %v overlap", before, r.Range)
		}
	}
	return nil
}

func (r Region) check(memorySize int64) error {
	size := r.PageSize
	if size == 0 {
		size = os.Getpagesize()
	}
	page := uint64(size)
	switch {
	case size < 4096 || size > maxPage || page&(page-1) != 0:
		return fmt.Errorf("%d bytes is not the size of a page", r.PageSize)
	case r.Range.Len == 0:
		return errors.New("it is empty")
	case uint64(r.Range.Start)%page != 0 || r.Range.Len%page != 0:
		return fmt.Errorf("it is not whole pages of %d bytes", size)
	case r.Range.End() < r.Range.Start:
		return errors.New("it wraps around the end of memory")
	case r.Offset < 0 || uint64(r.Offset)%page != 0:
		return fmt.Errorf("its offset, %d, is not that of a page of %d bytes", r.Offset, size)
	case r.Offset > memorySize || r.Range.Len > uint64(memorySize-r.Offset):
		return fmt.Errorf("its %d bytes at offset %d lie outside of the memory file, which has %d", r.Range.Len, r.Offset, memorySize)
	}
	return nil
}

// A limit is a Reader that fails when too much was read.
type limit struct {
	r    io.Reader
	left int
}

func (l *limit) Read(p []byte) (int, error) {
	if l.left == 0 {
		return 0, fmt.Errorf("it is longer than %d bytes", maxMessage)
	}
	n, err := l.r.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}
