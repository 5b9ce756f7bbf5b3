package pager

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
)

// A task is a Populate under way.
type task struct {
	ctx      context.Context
	ranges   []uffd.Range
	all      bool // ranges are those of all regions
	graduate bool
	record   *Record // to replay
	origin   origin

	// Of the loop.
	run      int       // the next of the record
	next     int       // of ranges
	at       uffd.Addr // in ranges[next], how far it has come; 0: at its start
	reading  int       // jobs
	outdated bool      // look again: there may be pages left
	err      error
	due      time.Duration // not to go on before
	tries    int
	ended    bool

	installed atomic.Uint64 // bytes
	total     atomic.Uint64
	moved     chan struct{} // installed has grown
	result    chan error
}

var errServeEnded = errors.New("pager: Serve has ended")

// populateChunk is how many bytes are installed at a time: faults wait that long.
const populateChunk = 128 << 10

// Populate installs the pages of ranges, or of all regions if there are none,
// that have not been touched yet, in the client's own process and in the children
// that it forks, while Serve goes on with faults, which come first; before Serve
// it waits. It returns when it has come to the end, with an error if pages are
// missing: then their source failed, or ctx or Serve ended. Pages that fail here
// are not poisoned.
//
// progress, if not nil, is called now and then with the bytes that are installed
// and those that were to be; a child adds to both.
func (c *Client) Populate(ctx context.Context, progress func(done, total uint64), ranges ...uffd.Range) error {
	return c.run(ctx, progress, func() *task { return &task{ranges: ranges, origin: populate} })
}

// Graduate populates all memory, makes sure that no page is missing, and
// unregisters it: the process, and the children that it has forked, run on
// without faults, as if nothing had been. It returns an error, and leaves the
// memory registered, if there are pages that cannot be had. Memory that is moved
// or unmapped meanwhile is an error, too, and some of it may not be registered
// any more then; to discard memory is fine.
//
// Serve goes on until the process ends, and has to: a thread that was discarding
// memory at that moment may have an event under way, and waits until that is read.
func (c *Client) Graduate(ctx context.Context, progress func(done, total uint64)) error {
	return c.run(ctx, progress, func() *task { return &task{graduate: true, origin: populate} })
}

// run has every member of the family do a task. Who is forked meanwhile joins in;
// from a process that is done, it lacks nothing.
func (c *Client) run(ctx context.Context, progress func(done, total uint64), newTask func() *task) error {
	err := errServeEnded // for all
	var installed, total uint64
	tried := make(map[*Client]bool)
	for member := c.family.another(tried); member != nil; member = c.family.another(tried) {
		tried[member] = true
		t := newTask()
		switch taskErr := member.do(ctx, t, func() {
			if progress != nil {
				progress(installed+t.installed.Load(), total+t.total.Load())
			}
		}); {
		case taskErr == nil:
			err = nil
		case errors.Is(taskErr, uffd.ErrGone), taskErr == errServeEnded && member.gone.Load():
			// Nobody misses what that lacked.
			if err == errServeEnded {
				err = taskErr
			}
		default:
			return taskErr
		}
		installed, total = installed+t.installed.Load(), total+t.total.Load()
	}
	return err
}

// do has the loop do a task.
func (c *Client) do(ctx context.Context, t *task, progress func()) error {
	t.ctx = ctx
	t.moved, t.result = make(chan struct{}, 1), make(chan error, 1)
	if !c.give(t) {
		return errServeEnded
	}
	defer context.AfterFunc(ctx, c.poke)()
	for {
		select {
		case err := <-t.result:
			progress()
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-t.moved:
			progress()
		}
	}
}

// give passes a task to the loop, unless there will be none.
func (c *Client) give(t *task) bool {
	c.queue.mu.Lock()
	defer c.queue.mu.Unlock()
	if c.queue.closed {
		return false
	}
	c.queue.tasks = append(c.queue.tasks, t)
	c.queue.filled.Store(true)
	c.poke()
	return true
}

// end gives the task's result.
func (t *task) end(err error) {
	if !t.ended {
		t.ended = true
		t.result <- err
	}
}

// finished takes note of a job of the task.
func (t *task) finished(j *job, err error) {
	t.reading--
	switch {
	case j.outdated:
		t.outdated = true
	case err != nil:
		t.fail(err)
	default:
		t.add(j.Len - j.gone)
	}
}

func (t *task) fail(err error) {
	if t.err == nil {
		t.err = err
	}
}

func (t *task) add(bytes uint64) {
	t.installed.Add(bytes)
	select {
	case t.moved <- struct{}{}:
	default:
	}
}

// step goes on with the first task. It reports whether it can go on at once.
func (c *Client) step() (busy bool) {
	l := &c.loop
	if len(l.tasks) == 0 {
		return false
	}
	t := l.tasks[0]
	if now() < t.due {
		return false
	}
	t.due = 0
	if t.ranges == nil && t.record == nil {
		t.all = true
		for _, r := range l.regions {
			t.ranges = append(t.ranges, r.Range)
		}
	}
	if t.total.Load() == 0 && t.record == nil {
		t.total.Store(c.missing(t.ranges))
	}
	switch {
	case t.ctx.Err() != nil:
		t.err = t.ctx.Err()
	case t.err != nil && t.record == nil:
	case t.next < len(t.ranges):
		if t.reading >= c.aheadLimit() {
			return false
		}
		c.stepRange(t)
		return t.due == 0
	case t.record != nil && c.advance(t):
		return true
	case t.reading > 0:
		return false
	case t.record != nil: // what others have done is done
	case c.isReading(t.ranges): // for others
		return false
	case t.outdated:
		t.next, t.outdated = 0, false
		if t.all {
			t.ranges = nil
		}
		return true
	case t.graduate:
		if c.readable() { // an event may be among it
			return true
		}
		t.err = c.leave()
	}
	if t.reading > 0 && t.ctx.Err() == nil {
		return false
	}
	t.end(t.err)
	l.tasks = l.tasks[1:]
	return len(l.tasks) > 0
}

// isReading reports whether pages in ranges are being read.
func (c *Client) isReading(ranges []uffd.Range) bool {
	for _, j := range c.loop.jobs {
		for _, r := range ranges {
			if !j.outdated && overlap(j.Range, r) {
				return true
			}
		}
	}
	return false
}

// missing counts the bytes of ranges that are absent.
func (c *Client) missing(ranges []uffd.Range) (bytes uint64) {
	for _, r := range ranges {
		for _, part := range c.loop.regions {
			if !overlap(part.Range, r) {
				continue
			}
			end := min(part.End(), r.End())
			for i := part.index(max(part.Start, r.Start)); i <= part.index(end-1); i++ {
				if part.state(i) == absent {
					bytes += part.pageSize
				}
			}
		}
	}
	return bytes
}

// stepRange installs the next few pages.
func (c *Client) stepRange(t *task) {
	within := t.ranges[t.next]
	at := max(t.at, within.Start)
	r := c.loop.regions.find(at)
	if r == nil { // go on with the next region
		i := c.loop.regions.after(at)
		if i == len(c.loop.regions) || c.loop.regions[i].Start >= within.End() {
			t.next, t.at = t.next+1, 0
			return
		}
		r = c.loop.regions[i]
		at = r.Start
	}
	i := r.index(at)
	end := r.pages()
	if within.End() < r.End() {
		end = r.index(within.End()-1) + 1
	}
	const scan = 1 << 16 // pages looked at in one step
	stop := min(end, i+scan)
	for i < stop && r.state(i) != absent {
		switch r.state(i) {
		case reading: // for others, perhaps in vain
			t.outdated = true
		case poisoned, held:
			if t.record != nil {
				break
			}
			t.fail(fmt.Errorf("pager: page %v has failed before", r.page(i)))
		}
		i++
	}
	if i < stop {
		stop = min(end, i+max(populateChunk/r.pageSize, 1))
		n := uint64(1)
		for i+n < stop && r.state(i+n) == absent {
			n++
		}
		if _, run := r.run(i); run > 0 {
			n = min(n, run)
		} else {
			n = 1
		}
		if !c.populate(t, r, i, n) {
			return
		}
		i += n
	}
	t.tries = 0
	t.at = r.Start + uffd.Addr(i*r.pageSize)
	if t.at >= within.End() {
		t.next, t.at = t.next+1, 0
	}
}

// populate installs pages, or has them read. It reports whether to go on behind
// them.
func (c *Client) populate(t *task, r *region, first, n uint64) bool {
	w := wanted{origin: t.origin}
	var err error
	if r.zeros(first, n) {
		err = c.fillZeros(r, first, n, w)
	} else {
		var lentErr error
		lentErr, err = c.fillLent(r, first, n, w)
		if lentErr != nil || errors.Is(err, syscall.EFAULT) {
			t.reading++
			c.submit(&job{Range: r.span(first, n), task: t}, r)
			return true
		}
	}
	switch {
	case err == nil:
		t.add(n * r.pageSize)
	case errors.Is(err, uffd.ErrRetry):
		t.due = now() + backoff(againMin, t.tries)
		t.tries++
		return false
	case errors.Is(err, uffd.ErrGone):
		c.gone.Store(true)
		return false
	case errors.Is(err, syscall.ENOENT) && n > 1: // mappings end in between
		for i := range n {
			if !c.populate(t, r, first+i, 1) {
				return false
			}
		}
	case errors.Is(err, syscall.ENOENT): // it was unmapped or unregistered
	default:
		t.fail(err)
	}
	return true
}

// leave unregisters all memory, if it is complete.
func (c *Client) leave() error {
	for _, r := range c.loop.regions {
		for i := range r.pages() {
			switch r.state(i) {
			case absent, reading, poisoned, held:
				return fmt.Errorf("pager: page %v is missing", r.page(i))
			}
		}
	}
	for _, r := range c.loop.regions {
		if r.memory != nil { // from now on nobody says what becomes of it: it is not to be written
			file := c.files[r.home]
			file.mu.Lock()
			file.add(r, 0, r.pages())
			file.mu.Unlock()
		}
	}
	c.loop.graduated = true
	return c.unregister()
}

func (c *Client) unregister() error {
	var err error
	for _, r := range c.loop.regions {
		err = errors.Join(err, c.file.Unregister(r.Range))
	}
	return err
}
