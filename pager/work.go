package pager

import (
	"context"
	"errors"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

// A job is a read of a source, for pages that are in state reading meanwhile.
type job struct {
	uffd.Range // the pages
	source     source.Source
	offset     int64
	pageSize   uint64
	wanted     uffd.Addr // the page with the fault
	fault      pending
	task       *task // that asked for it, or nil
	ahead      bool  // nobody waits for it

	ctx      context.Context
	begin    time.Duration
	outdated bool // the pages are not what they were: do not install

	// Of the worker.
	tries int
	start time.Duration // of the first

	buf    []byte
	served uffd.Range // what was read: all, or only the page that is wanted
	gone   uint64     // bytes of it for which there is no memory
	err    error
}

// queue is where the loop and its workers meet.
type queue struct {
	mu      sync.Mutex
	demand  []*job
	ahead   []*job // for nobody who waits
	done    []*job
	closed  bool    // there will be no loop any more
	tasks   []*task // new ones
	buffers [][]byte
	running int // workers
	reading int // of them, jobs that are ahead

	filled atomic.Bool // done or tasks has something
}

// take returns what is new for the loop.
func (q *queue) take() (done []*job, tasks []*task) {
	q.mu.Lock()
	defer q.mu.Unlock()
	done, tasks = q.done, q.tasks
	q.done, q.tasks = nil, nil
	q.filled.Store(false)
	return done, tasks
}

// clear forgets what no worker has begun, and what nobody took.
func (q *queue) clear(closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = closed
	for _, t := range q.tasks {
		t.end(errServeEnded)
	}
	q.demand, q.ahead, q.done, q.tasks = nil, nil, nil, nil
	q.filled.Store(false)
}

func (c *Client) workers() int {
	if c.pager.Workers > 0 {
		return c.pager.Workers
	}
	return 16
}

func (c *Client) retryFor() time.Duration {
	if c.pager.RetryFor == 0 {
		return time.Second
	}
	return c.pager.RetryFor
}

// submit has a worker read what j, of r, needs.
func (c *Client) submit(j *job, r *region) {
	first := r.index(j.Start)
	j.source, j.offset, j.pageSize = r.source, r.sourceOffset(first), r.pageSize
	j.ctx, j.begin, j.ahead = c.loop.ctx, now(), j.task != nil
	for i := range j.Len / r.pageSize {
		r.setState(first+i, reading)
	}
	c.loop.jobs = append(c.loop.jobs, j)

	q := &c.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	if j.ahead {
		q.ahead = append(q.ahead, j)
	} else {
		q.demand = append(q.demand, j)
	}
	if q.running < c.workers() {
		q.running++
		c.family.workers.Add(1)
		go c.worker(nil)
	}
}

// hurry is called for a fault of a page that is being read. If nobody waited for
// that, somebody does now.
func (c *Client) hurry(page uffd.Addr, p pending) {
	q := &c.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.IndexFunc(q.ahead, func(j *job) bool { return j.Contains(page) })
	if i < 0 {
		return
	}
	j := q.ahead[i]
	q.ahead = slices.Delete(q.ahead, i, i+1)
	j.wanted, j.fault, j.ahead = page, p, false
	q.demand = append(q.demand, j)
}

// next returns a job to read, demand first, or nil.
func (q *queue) next(limit int) *job {
	q.mu.Lock()
	defer q.mu.Unlock()
	var j *job
	switch {
	case len(q.demand) > 0:
		j = q.demand[0]
		q.demand = q.demand[1:]
	case len(q.ahead) > 0 && q.reading < limit:
		j = q.ahead[0]
		q.ahead = q.ahead[1:]
		q.reading++
	default:
		q.running--
		return nil
	}
	if n := len(q.buffers); n > 0 {
		j.buf = q.buffers[n-1]
		q.buffers = q.buffers[:n-1]
	}
	return j
}

// aheadLimit is how many workers may read what nobody waits for.
func (c *Client) aheadLimit() int { return max(1, c.workers()/4) }

// worker reads sources until there is nothing to read, beginning with j, if that is
// not nil.
func (c *Client) worker(j *job) {
	defer c.family.workers.Done()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if j != nil { // a source has called runtime.Goexit
			c.family.workers.Add(1)
			go c.worker(j)
		}
	}()
	q := &c.queue
	for {
		if j == nil {
			if j = q.next(c.aheadLimit()); j == nil {
				return
			}
		}
		c.read(j)
		q.mu.Lock()
		if j.ahead {
			q.reading--
		}
		q.done = append(q.done, j)
		q.filled.Store(true)
		q.mu.Unlock()
		j = nil
		c.poke()
	}
}

// read reads what a job needs. It keeps trying, if somebody waits.
func (c *Client) read(j *job) {
	if j.tries == 0 {
		if uint64(cap(j.buf)) < j.Len {
			j.buf = make([]byte, j.Len)
		}
		j.served, j.start = j.Range, now()
	} else if c.readFailed(j) { // for another worker, which that has ended
		return
	}
	for !c.tryRead(j) && !c.readFailed(j) {
	}
}

// tryRead reads once. It reports whether that is enough.
func (c *Client) tryRead(j *job) bool {
	j.tries++
	c.counters.reads.Add(1)
	j.err = errGoexit // unless Read returns
	j.err = source.Read(j.ctx, j.source, j.buf[:j.served.Len], j.offset+int64(j.served.Start-j.Start))
	return j.err == nil || j.ctx.Err() != nil
}

// readFailed takes note of a failed read. It reports whether that was the last; if
// not, it is time for the next one.
func (c *Client) readFailed(j *job) bool {
	c.counters.readErrors.Add(1)
	if j.ahead || j.ctx.Err() != nil || j.served.Len == j.pageSize && now()-j.start >= c.retryFor() {
		return true
	}
	// It may be the neighbours that fail.
	j.served = uffd.Range{Start: j.wanted, Len: j.pageSize}
	pause(j.ctx, backoff(readMin, j.tries-1))
	return false
}

var errGoexit = errors.New("pager: the goroutine has ended (runtime.Goexit)")

const readMin = time.Millisecond

// maxBuffer is the size of the largest buffer that is kept for the next read, as
// many as there are workers.
const maxBuffer = 2 << 20

// finish installs what a job has read. It reports whether the job is over.
func (c *Client) finish(j *job) (over bool) {
	r := c.loop.regions.find(j.Start)
	switch {
	case j.outdated || r == nil:
		c.release(j, nil)
		return true
	case j.err != nil && j.ctx.Err() != nil: // Serve ends
		return false
	}
	wantedPage := r.index(j.wanted)
	err := j.err
	if err == nil {
		w := wanted{wantedPage, demand}
		if j.task != nil {
			w.origin = j.task.origin
		}
		first, n := r.index(j.served.Start), j.served.Len/r.pageSize
		bytes := j.buf[:j.served.Len]
		for n > 0 && r.state(first) != reading { // installed before an EAGAIN
			first, n, bytes = first+1, n-1, bytes[r.pageSize:]
		}
		err = c.fillBytes(r, first, n, bytes, w)
		if n > 1 && errors.Is(err, syscall.ENOENT) {
			err = c.fillEach(j, r, first, bytes, w)
		}
		if errors.Is(err, uffd.ErrRetry) {
			c.counters.deferred.Add(1)
			return false
		}
	}
	if r.memory != nil {
		defer c.wakeTwins(j.Range)
	}
	if err != nil || j.served != j.Range {
		// Threads may wait for what is not there: they ask again.
		c.loop.regions.reset(j.Range)
		defer c.file.Wake(j.Range)
	}
	switch p := j.fault; {
	case j.ahead:
	case err == nil:
		end := now()
		c.counters.latency.observe(end - j.begin)
		c.counters.total.observe(end - p.read)
	case j.err != nil:
		c.fail(r, wantedPage, p, err)
	default:
		c.settle(r, r.page(wantedPage), p, err)
	}
	c.release(j, err)
	return true
}

// fillEach installs pages one by one, for mappings end between them. Those that
// nobody waits for may not be there.
func (c *Client) fillEach(j *job, r *region, first uint64, bytes []byte, w wanted) error {
	for i := first; len(bytes) > 0; i, bytes = i+1, bytes[r.pageSize:] {
		err := c.fillBytes(r, i, 1, bytes[:r.pageSize], w)
		switch {
		case errors.Is(err, syscall.ENOENT) && (j.ahead || i != w.page):
			r.setState(i, absent)
			j.gone += r.pageSize
			c.file.Wake(r.page(i))
		case err != nil:
			return err
		}
	}
	return nil
}

// release ends a job.
func (c *Client) release(j *job, err error) {
	if j.task != nil {
		j.task.finished(j, err)
	}
	if i := slices.Index(c.loop.jobs, j); i >= 0 {
		c.loop.jobs = slices.Delete(c.loop.jobs, i, i+1)
	}
	q := &c.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.buffers) < c.workers() && cap(j.buf) <= maxBuffer {
		q.buffers = append(q.buffers, j.buf)
	}
	j.buf = nil
}
