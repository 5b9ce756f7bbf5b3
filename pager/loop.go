package pager

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
)

// A loop is the goroutine that serves a client, and what it owns. It reads
// messages, takes the events of a batch before its faults, and installs pages;
// nobody else does. So no page is installed between the reading of an event and
// what follows from it, and no state needs a lock. Workers only read sources.
type loop struct {
	ctx      context.Context // of Serve
	regions  regions
	msgs     [64]uffd.Msg // if there is no ledger
	jobs     []*job       // with the workers, or done and not yet installed
	done     []*job       // of them, those that are read
	tasks    []*task      // of Populate
	again    []pending    // the kernel said EAGAIN
	trying   []pending    // of them, those that retry tries
	orphaned error        // why children of a batch are not served
	retryAt  time.Duration
	tries    int // in a row that ended with EAGAIN
	troubles map[uffd.Addr]trouble

	graduated bool // nothing is to be registered any more

	ticker *time.Timer   // when to look after the process
	armed  time.Duration // deadline of the File, or unarmed

	lent lent
	use  func([]byte) error // useLent
}

// A pending is a fault that has been read and is not resolved.
type pending struct {
	uffd.Pagefault
	read time.Duration
}

const (
	tickEvery = time.Second

	// A deadline of the File costs a look at the clock for each message, so that
	// there is none as a rule.
	forever = time.Duration(math.MaxInt64)
	unarmed = time.Duration(-1)

	busyWait = time.Millisecond // how long a message that is announced may take to come

	againMin   = 20 * time.Microsecond
	troubleMin = 100 * time.Microsecond
)

// backoff returns first·2ⁿ, at most first·1024.
func backoff(first time.Duration, n int) time.Duration { return first << min(max(n, 0), 10) }

var epoch = time.Now()

// now is the time as the loop counts it.
func now() time.Duration { return time.Since(epoch) }

// poke makes the loop look at its queue, its context and the process.
func (c *Client) poke() { c.file.SetReadDeadline(epoch) }

// attention reports whether there is something to look at for which poke was, or
// is about to be called.
func (c *Client) attention(ctx context.Context) bool {
	return c.queue.filled.Load() || c.ticked.Load() || c.gone.Load() || ctx.Err() != nil
}

// tick makes the loop look after the process.
func (c *Client) tick() {
	c.ticked.Store(true)
	c.poke()
}

// serve is the loop's life.
func (c *Client) serve(ctx context.Context) error {
	// Memory and sources of others may fault: that is to be an error.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer context.AfterFunc(ctx, c.poke)()
	if c.peer != nil {
		defer c.watch()()
	}
	defer c.abandon()
	l := &c.loop
	l.ticker = time.AfterFunc(tickEvery, c.tick)
	defer l.ticker.Stop()
	l.ctx, l.armed = ctx, unarmed
	if c.ledger != nil && c.ledger.lost > 0 {
		c.ledger.lost = 0
		c.report(ErrChildrenLost)
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if c.gone.Load() {
			return nil
		}
		busy := c.work()
		if busy && !c.readable() {
			continue
		}
		c.arm(busy)
		if !busy && c.attention(ctx) { // arm may have undone the poke
			continue
		}
		err := c.readOn(busy)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			l.armed = unarmed
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM):
			c.report(fmt.Errorf("pager: a child waits for a free descriptor, or for memory: %w", err))
			pause(ctx, backoff(troubleMin, 10))
		default:
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// watch notices the end of the peer. The function that it returns ends it.
func (c *Client) watch() (stop func()) {
	over := make(chan struct{})
	go func() {
		defer close(over)
		if waitHangup(c.peer) {
			c.gone.Store(true)
			c.poke()
		}
	}()
	return func() {
		c.peer.SetReadDeadline(epoch)
		<-over
		c.peer.SetReadDeadline(time.Time{})
	}
}

// arm sets the time at which ReadMsgs gives up.
func (c *Client) arm(busy bool) {
	l := &c.loop
	want := forever
	if busy {
		want = now() + busyWait
	}
	if len(l.again) > 0 || len(l.done) > 0 {
		want = min(want, l.retryAt)
	}
	if len(l.tasks) > 0 && l.tasks[0].due > 0 {
		want = min(want, l.tasks[0].due)
	}
	for _, t := range l.troubles {
		if t.waits {
			want = min(want, t.due)
		}
	}
	if want == l.armed {
		return
	}
	l.armed = want
	if want == forever {
		c.file.SetReadDeadline(time.Time{})
	} else {
		c.file.SetReadDeadline(epoch.Add(max(want, 1)))
	}
}

// readOn handles messages until there is something else to do: poke ends the
// reading, unless what there is has come of the messages.
func (c *Client) readOn(busy bool) error {
	for {
		msgs, err := c.readMsgs()
		if err != nil {
			return err
		}
		c.batch(msgs)
		if c.ledger != nil {
			c.ledger.clear()
		}
		if busy || c.loop.hasWork() || c.gone.Load() {
			return nil
		}
	}
}

// hasWork reports whether there is something that work would look at.
func (l *loop) hasWork() bool {
	return len(l.done)+len(l.again)+len(l.tasks)+len(l.troubles) > 0
}

func (c *Client) readMsgs() ([]uffd.Msg, error) {
	if c.ledger != nil {
		return c.ledger.read()
	}
	n, err := c.file.ReadMsgs(c.loop.msgs[:])
	return c.loop.msgs[:n], err
}

// batch handles messages that were read together.
func (c *Client) batch(msgs []uffd.Msg) {
	events := 0
	for i := range msgs {
		if msgs[i].Event() != uffd.EventPagefault {
			c.event(&msgs[i])
			events++
			if c.ledger != nil {
				c.ledger.apply(i, c.loop.regions)
			}
		}
	}
	if events > 0 { // what was refused because of them may go on
		c.loop.retryAt, c.loop.tries = 0, 0
		if c.loop.graduated {
			c.unregister()
		}
	}
	if err := c.loop.orphaned; err != nil { // not before all events are applied
		c.loop.orphaned = nil
		c.report(err)
	}
	if events == len(msgs) {
		return
	}
	read := now()
	begin := read
	for i := range msgs {
		if f, ok := msgs[i].Pagefault(); ok {
			c.counters.count(f.Flags)
			begin = c.attempt(pending{f, read}, begin)
		}
	}
}

// attempt tries to resolve a fault, and returns the time.
func (c *Client) attempt(p pending, begin time.Duration) time.Duration {
	over := c.resolve(p)
	end := now()
	if over {
		c.counters.latency.observe(end - begin)
		c.counters.total.observe(end - p.read)
	}
	return end
}

// work does what is to be done besides messages. It reports whether there is
// more to do at once.
func (c *Client) work() (busy bool) {
	l := &c.loop
	if c.queue.filled.Load() {
		done, tasks := c.queue.take()
		l.done = append(l.done, done...)
		l.tasks = append(l.tasks, tasks...)
		l.retryAt = 0
	}
	ticked := c.ticked.Load() && c.ticked.Swap(false)
	if !l.hasWork() && !ticked {
		return false
	}
	t := now()
	if t >= l.retryAt && len(l.done)+len(l.again) > 0 {
		c.retry(t)
	}
	for page, trouble := range l.troubles {
		if trouble.waits && t >= trouble.due {
			trouble.waits = false
			l.troubles[page] = trouble
			c.attempt(trouble.pending, t)
		} else if !trouble.waits && t > trouble.due+5*tickEvery {
			delete(l.troubles, page)
		}
	}
	if ticked {
		l.ticker.Reset(tickEvery)
		c.probe()
	}
	return c.step()
}

// retry tries again what the kernel refused.
func (c *Client) retry(t time.Duration) {
	l := &c.loop
	tries := l.tries
	again := l.again
	l.again, l.trying = nil, again
	for _, p := range again {
		c.attempt(p, t)
	}
	l.trying = nil
	done := l.done
	l.done = l.done[:0]
	for _, j := range done {
		if !c.finish(j) {
			l.done = append(l.done, j)
		}
	}
	if len(l.again)+len(l.done) == 0 {
		l.tries = 0
		if cap(again) > 0 && l.again == nil {
			l.again = again[:0]
		}
		return
	}
	l.tries = tries + 1
	l.retryAt = t + backoff(againMin, l.tries)
}

// later notes a fault that the kernel refused to resolve now.
func (c *Client) later(p pending) {
	l := &c.loop
	c.counters.deferred.Add(1)
	if len(l.again) == 0 && len(l.done) == 0 {
		l.retryAt = now() + againMin
	}
	for _, q := range l.again {
		if q.Addr == p.Addr && q.Flags == p.Flags {
			return
		}
	}
	l.again = append(l.again, p)
}

// event handles a message that is not a fault.
func (c *Client) event(m *uffd.Msg) {
	l := &c.loop
	switch m.Event() {
	case uffd.EventFork:
		c.counters.forks.Add(1)
		c.fork(m)
	case uffd.EventRemap:
		c.counters.remaps.Add(1)
		if r, ok := m.Remap(); ok {
			c.outdate(uffd.Range{Start: r.From, Len: r.Len})
			c.outdate(uffd.Range{Start: r.To, Len: r.Len}) // unmapped by that, maybe without an event
			for _, t := range l.tasks {                    // it may have been moved out of their sight
				t.outdated = true
			}
		}
	case uffd.EventRemove:
		c.counters.removes.Add(1)
		if r, ok := m.Remove(); ok {
			c.outdate(r)
			l.regions.twins(r, c.outdate)
		}
	case uffd.EventUnmap:
		c.counters.unmaps.Add(1)
		if r, ok := m.Unmap(); ok {
			c.outdate(r)
		}
	}
	l.regions.apply(m)
}

// fork adopts the child.
func (c *Client) fork(m *uffd.Msg) {
	file, err := c.file.Child(m)
	if err != nil {
		if fd, ok := m.Fork(); ok {
			closeFD(fd)
		}
		c.loop.orphaned = errors.Join(c.loop.orphaned, fmt.Errorf("pager: a child cannot be served: %w", err))
		return
	}
	child := &Client{pager: c.pager, file: file, files: c.files, counters: c.counters, family: c.family}
	child.init()
	child.loop.regions = c.loop.regions.clone()
	for _, j := range c.loop.jobs {
		if !j.outdated { // the parent's, not the child's
			child.loop.regions.reset(j.Range)
		}
	}
	c.family.adopt(child)
}

// outdate makes worthless what is known of faults in r, and what is being read
// for them. Threads that wait there ask again, also those for whose page the
// source has failed.
func (c *Client) outdate(r uffd.Range) {
	l := &c.loop
	for _, j := range l.jobs {
		if !j.outdated && overlap(j.Range, r) {
			c.drop(j)
		}
	}
	l.again = slices.DeleteFunc(l.again, func(p pending) bool { return r.Contains(p.Addr) })
	for page := range l.troubles {
		if r.Contains(page) {
			delete(l.troubles, page)
		}
	}
	c.file.Wake(r)
}

// drop gives the pages of a job back.
func (c *Client) drop(j *job) {
	j.outdated = true
	c.counters.discarded.Add(j.Len / j.pageSize)
	c.loop.regions.reset(j.Range)
	c.wake(j.Range)
}

// wake wakes who waits for pages in r, wherever they are mapped.
func (c *Client) wake(r uffd.Range) {
	c.file.Wake(r)
	c.wakeTwins(r)
}

func (c *Client) wakeTwins(r uffd.Range) {
	c.loop.regions.twins(r, func(twin uffd.Range) { c.file.Wake(twin) })
}

// abandon leaves everything as another server has to find it.
func (c *Client) abandon() {
	l := &c.loop
	c.queue.clear(c.gone.Load())
	for _, j := range l.jobs {
		if !j.outdated {
			c.drop(j)
		}
	}
	for _, t := range l.tasks {
		t.end(errServeEnded)
	}
	// Faults outside of all regions: the last that were read may not be resolved, if a
	// function of the caller has ended this goroutine.
	for _, p := range slices.Concat(l.again, l.trying) {
		c.wakeFault(p.Addr)
	}
	msgs := l.msgs[:]
	if c.ledger != nil {
		msgs = c.ledger.head.msgs[:]
	}
	for i := range msgs {
		if f, ok := msgs[i].Pagefault(); ok {
			c.wakeFault(f.Addr)
		}
	}
	if c.ledger != nil {
		c.ledger.clear() // its events are applied
	}
	l.jobs, l.done, l.tasks, l.again, l.trying = nil, nil, nil, nil, nil
	clear(l.troubles)
	for _, r := range l.regions {
		c.file.Wake(r.Range)
	}
}

func (c *Client) wakeFault(a uffd.Addr) {
	c.file.Wake(uffd.Range{Start: a &^ (systemPage - 1), Len: uint64(systemPage)})
}

// probe finds out whether the process lives: of a page that nobody registers the
// kernel says so.
func (c *Client) probe() {
	const lowest = 64 << 10 // that processes can map
	nobodys := uffd.Range{Start: lowest, Len: uint64(os.Getpagesize())}
	if c.loop.regions.find(nobodys.Start) != nil {
		return
	}
	if _, err := c.file.ZeroPage(nobodys, uffd.ZeroPageDontWake); errors.Is(err, uffd.ErrGone) {
		c.gone.Store(true)
	}
}
