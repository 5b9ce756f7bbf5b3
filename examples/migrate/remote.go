//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// patience is how long a peer may take for an answer, or to accept one.
const patience = 30 * time.Second

// A remote is the memory of a process that has come from another machine and left
// its memory there: a source.Source that asks for it. After any failure it is of
// no more use: every read fails with the first error.
type remote struct {
	conn     net.Conn
	pageSize int
	size     int64
	failed   chan struct{} // closed when err is set

	writing sync.Mutex

	mu      sync.Mutex
	err     error
	last    uint32
	waiting map[uint32]call

	sumsMu sync.Mutex
	sums   map[int64][sha256.Size]byte // of the pages that have come, by offset
}

// A call waits for a reply.
type call struct {
	payload []byte // where it goes; nil if nobody waits any more
	length  int
	over    chan struct{}
}

// newRemote asks over a connection from which the hello has been read. The
// connection is the remote's from now on.
func newRemote(conn net.Conn, h *hello) *remote {
	r := &remote{
		conn:     conn,
		pageSize: h.pageSize,
		size:     h.memory,
		failed:   make(chan struct{}),
		waiting:  make(map[uint32]call),
		sums:     make(map[int64][sha256.Size]byte),
	}
	go r.receive()
	return r
}

var errClosed = errors.New("the connection has been closed here")

func (r *remote) close() { r.fail(errClosed) }

// fail ends everything that waits, and all that comes.
func (r *remote) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = err
		close(r.failed)
		r.conn.Close()
	}
}

func (r *remote) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// receive passes replies to those who wait for them.
func (r *remote) receive() {
	buf := make([]byte, max(maxRead, maxSums*sha256.Size))
	for {
		id, payload, err := readReply(r.conn, buf, r.expected)
		if err == io.EOF {
			err = errors.New("the source hung up")
		}
		if err != nil {
			r.fail(fmt.Errorf("the connection to the source is lost: %w", err))
			return
		}
		r.mu.Lock()
		c := r.waiting[id]
		delete(r.waiting, id)
		copy(c.payload, payload)
		close(c.over)
		r.mu.Unlock()
	}
}

func (r *remote) expected(id uint32) (int, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.waiting[id]
	return c.length, ok
}

// ask makes a request, and fills payload with the reply.
func (r *remote) ask(ctx context.Context, q request, payload []byte) error {
	c := call{payload, len(payload), make(chan struct{})}
	r.mu.Lock()
	if r.err != nil {
		r.mu.Unlock()
		return r.err
	}
	r.last++
	q.id = r.last
	r.waiting[q.id] = c
	r.mu.Unlock()

	r.writing.Lock()
	r.conn.SetWriteDeadline(time.Now().Add(patience))
	err := q.write(r.conn)
	r.writing.Unlock()
	if err != nil {
		r.fail(fmt.Errorf("the connection to the source is lost: %w", err))
	}
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	select {
	case <-c.over:
		return nil
	case <-r.failed:
	case <-ctx.Done():
	case <-timeout.C:
		r.fail(fmt.Errorf("the source has not answered for %v", patience))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.waiting[q.id]; ok { // the reply must not be written to payload
		c.payload = nil
		r.waiting[q.id] = c
	}
	if r.err != nil {
		return r.err
	}
	return context.Cause(ctx)
}

func (r *remote) Size() int64 { return r.size }

// ReadAt reads whole pages.
func (r *remote) ReadAt(ctx context.Context, p []byte, off int64) (n int, err error) {
	for n < len(p) {
		part := p[n:min(n+maxRead, len(p))]
		if err := r.ask(ctx, request{kind: read, offset: off + int64(n), length: uint32(len(part))}, part); err != nil {
			return n, err
		}
		r.note(part, off+int64(n))
		n += len(part)
	}
	return n, nil
}

// note remembers what has come.
func (r *remote) note(pages []byte, off int64) {
	for ; len(pages) > 0; pages = pages[r.pageSize:] {
		sum := sha256.Sum256(pages[:r.pageSize])
		r.sumsMu.Lock()
		r.sums[off] = sum
		r.sumsMu.Unlock()
		off += int64(r.pageSize)
	}
}

// verify compares the pages that have come with those of the source. It returns
// how many there are.
func (r *remote) verify(ctx context.Context) (pages int, err error) {
	for off := int64(0); off < r.size; {
		length := min(r.size-off, maxSums*int64(r.pageSize))
		want := make([]byte, length/int64(r.pageSize)*sha256.Size)
		if err := r.ask(ctx, request{kind: sums, offset: off, length: uint32(length)}, want); err != nil {
			return pages, err
		}
		for ; len(want) > 0; want = want[sha256.Size:] {
			r.sumsMu.Lock()
			got, ok := r.sums[off]
			r.sumsMu.Unlock()
			if ok {
				if got != [sha256.Size]byte(want) {
					return pages, fmt.Errorf("the page at offset %d is not that of the source", off)
				}
				pages++
			}
			off += int64(r.pageSize)
		}
	}
	return pages, nil
}
