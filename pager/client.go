package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
)

// A Client is a userfaultfd with its memory, and those of the children that its
// process forks.
type Client struct {
	pager    *Pager
	file     *uffd.File
	counters *counters // shared by the family
	family   *family
	peer     Peer
	gone     atomic.Bool   // the process is
	ticked   atomic.Bool   // it is to be looked after
	homes    []Region      // as attached
	files    []*sharedFile // by home, if that has Memory; shared with children
	recorder atomic.Pointer[recorder]
	ledger   *ledger // nil: nobody can take over

	loop  loop
	queue queue
}

// A family is a client and the children that its process has forked.
type family struct {
	root *Client

	mu      sync.Mutex
	members []*Client // that are not gone
	serving bool
	closed  bool
	ctx     context.Context // of Serve
	end     context.CancelCauseFunc
	failure error          // of a member, ended Serve
	running sync.WaitGroup // for each member that is served
	workers sync.WaitGroup // also of members that are gone: they use sources
	over    chan struct{}  // closed when Serve returns
}

func newClient(p *Pager, f *uffd.File) *Client {
	c := &Client{pager: p, file: f, counters: new(counters)}
	c.family = &family{root: c, members: []*Client{c}}
	c.init()
	return c
}

func (c *Client) init() {
	c.loop.use = c.useLent
	c.loop.troubles = make(map[uffd.Addr]trouble)
}

// Peer is what tells by its end that a process is gone: a pidfd (see [OpenPid]), or
// the connection over which the userfaultfd came.
type Peer interface {
	syscall.Conn
	SetReadDeadline(time.Time) error
}

// Watch lets Serve know at once when peer hangs up, or the process behind a pidfd
// exits: that client is gone then. Without, an exit is noticed within a second or
// so. Watch is called before Serve. peer stays the caller's; its read deadline is
// Serve's.
func (c *Client) Watch(peer Peer) { c.peer = peer }

// Stats returns the numbers of the client, its children included.
func (c *Client) Stats() Stats { return c.counters.load() }

// Serve serves the client's faults until the process, and every child that it
// forked, is gone: then it returns nil. It returns the error of ctx if that ends
// before, ErrShutdown after [Pager.Shutdown], and what reading failed with if it
// fails for good.
//
// Whatever was read and is not resolved when Serve returns comes up again for
// whoever serves the client next: another call of Serve, or another process.
func (c *Client) Serve(ctx context.Context) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	f := c.family
	f.mu.Lock()
	switch {
	case f.closed:
		f.mu.Unlock()
		return os.ErrClosed
	case f.serving:
		f.mu.Unlock()
		return errors.New("pager: the client is being served already")
	}
	f.serving, f.ctx, f.end, f.failure = true, ctx, end, nil
	f.over = make(chan struct{})
	for _, member := range f.members {
		f.start(member)
	}
	f.mu.Unlock()

	f.running.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.serving = false
	close(f.over)
	switch {
	case f.failure != nil:
		return f.failure
	case len(f.members) == 0:
		return nil
	}
	return context.Cause(ctx)
}

// start serves a member. f.mu is held.
func (f *family) start(c *Client) {
	f.running.Add(1)
	ctx := f.ctx
	go func() {
		defer f.running.Done()
		err := fmt.Errorf("pager: a source, BeforeWrite or ErrorHook: %w", errGoexit) // unless serve returns
		defer func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if c.gone.Load() {
				f.leave(c)
			} else if ctx.Err() == nil { // the others cannot make up for it
				f.failure = err
				f.end(err)
			}
		}()
		err = c.serve(ctx)
	}()
}

// another returns a member that is not among those, or nil.
func (f *family) another(those map[*Client]bool) *Client {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.members {
		if !those[c] {
			return c
		}
	}
	return nil
}

// leave takes a member out. f.mu is held.
func (f *family) leave(c *Client) {
	if i := slices.Index(f.members, c); i >= 0 {
		f.members = slices.Delete(f.members, i, i+1)
	}
	if c != f.root {
		c.file.Close()
		if l := f.root.ledger; l != nil {
			l.head.children.Add(-1)
		}
	}
}

// adopt serves a child.
func (f *family) adopt(c *Client) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.members = append(f.members, c)
	if l := f.root.ledger; l != nil {
		l.head.children.Add(1)
	}
	f.start(c)
}

// Close ends Serve, waits for the sources that are being read, and closes the
// userfaultfds of children. That one which Attach was given stays open.
//
// For a child that is alive it is as with [uffd.File.Close]: if nobody else holds
// its userfaultfd, its missing memory reads as zeros from now on.
func (c *Client) Close() error {
	f := c.family
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return os.ErrClosed
	}
	f.closed = true
	f.mu.Unlock()
	f.interrupt(os.ErrClosed)
	f.wait(context.Background())
	c.queue.clear(true)
	f.workers.Wait()
	c.file.SetReadDeadline(time.Time{}) // it is the caller's again

	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.members) > 0 {
		f.leave(f.members[0])
	}
	c.pager.forget(c)
	if c.ledger != nil {
		c.ledger.close()
	}
	return nil
}

// interrupt has Serve return a cause.
func (f *family) interrupt(cause error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.serving {
		f.end(cause)
	}
}

// wait waits until Serve has returned.
func (f *family) wait(ctx context.Context) error {
	f.mu.Lock()
	over := f.over
	f.mu.Unlock()
	if over == nil {
		return nil
	}
	select {
	case <-over:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// report tells the pager's owner what went wrong.
func (c *Client) report(err error) {
	if hook := c.pager.ErrorHook; hook != nil {
		hook(c.family.root, err)
	}
}
