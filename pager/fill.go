package pager

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

// errWaits is for a fault that somebody else will resolve.
var errWaits = errors.New("waits")

// resolve deals with a fault. It reports whether that is over and done with;
// if not, a worker has it, or it is noted for later.
func (c *Client) resolve(p pending) (over bool) {
	r := c.loop.regions.find(p.Addr)
	if r == nil {
		return c.settle(nil, uffd.Range{Start: p.Addr &^ (systemPage - 1), Len: uint64(systemPage)}, p, c.unknown(p))
	}
	i := r.index(p.Addr)
	if len(c.loop.troubles) > 0 && c.throttled(r.page(i).Start, p) {
		return false
	}
	var err error
	switch {
	case p.Flags.Has(uffd.PagefaultWP):
		err = c.unlock(r, i)
	case p.Flags.Has(uffd.PagefaultRWP): // it is there, or was when the thread asked
		err = c.liftRWP(r.page(i))
	default:
		err = c.provide(r, i, p)
	}
	return err == nil || c.settle(r, r.page(i), p, err)
}

var systemPage = uffd.Addr(os.Getpagesize())

// settle does what has to follow from the kernel's answer. r is nil outside of
// all regions.
func (c *Client) settle(r *region, page uffd.Range, p pending, err error) (over bool) {
	switch {
	case err == nil:
		return true
	case err == errWaits:
		return false
	case errors.Is(err, uffd.ErrRetry):
		c.later(p)
		return false
	case errors.Is(err, uffd.ErrGone):
		c.gone.Store(true)
		return false
	case errors.Is(err, syscall.ENOENT), errors.Is(err, os.ErrClosed):
		// It was unmapped or unregistered: the thread sees for itself.
		c.counters.dropped.Add(1)
		c.file.Wake(page)
		return true
	}
	c.trouble(r, page, p, err)
	return false
}

// unknown deals with a fault outside of all regions.
func (c *Client) unknown(p pending) error {
	page := uffd.Range{Start: p.Addr &^ (systemPage - 1), Len: uint64(systemPage)}
	action := c.pager.OnFailure
	var err error
	switch {
	case p.Flags.Has(uffd.PagefaultWP): // it is there, and nobody wants to know
		if err = c.file.WriteProtect(page, 0); err == nil {
			c.counters.unlocked.Add(1)
			return nil
		}
	case p.Flags.Has(uffd.PagefaultRWP):
		if err = c.liftRWP(page); err == nil {
			return nil
		}
	case !c.pager.UnknownZero && action == Poison:
		err = c.poisonPage(page)
	case !c.pager.UnknownZero && action == Hold:
	case p.Flags.Has(uffd.PagefaultMinor): // the file has it
		_, err = c.file.Continue(page, 0)
	default:
		if _, err = c.file.ZeroPage(page, 0); errors.Is(err, syscall.EEXIST) {
			_, err = c.zeroOver(page.Start)
		}
	}
	if errors.Is(err, syscall.EEXIST) {
		err = c.file.Wake(page)
	}
	if errors.Is(err, uffd.ErrRetry) || errors.Is(err, uffd.ErrGone) || errors.Is(err, syscall.ENOENT) {
		return err
	}
	if err == nil && c.pager.UnknownZero {
		c.counters.unknown.Add(1)
		return nil
	}
	if err != nil {
		action = Hold
	}
	if action == Hold {
		// The memory may have been unmapped since the fault, and nobody may be
		// left waiting then. If it was not, the thread asks once more.
		if _, asked := c.loop.troubles[page.Start]; !asked {
			t := now()
			c.loop.troubles[page.Start] = trouble{since: t, due: t}
			return c.file.Wake(page)
		}
	}
	c.counters.unknown.Add(1)
	c.report(&PageError{page, action, errors.Join(errUnknown, err)})
	return nil
}

var errUnknown = errors.New("it is outside of all regions")

// unlock lets a protected page be written.
func (c *Client) unlock(r *region, i uint64) error {
	if r.beforeWrite != nil {
		c.callBeforeWrite(r, i)
	}
	err := c.file.WriteProtect(r.page(i), 0)
	if err == nil {
		c.counters.unlocked.Add(1)
	}
	return err
}

// liftRWP ends the protection of a page from accesses, which somebody else has
// asked for. A page that has gone meanwhile is missing when the thread asks again.
func (c *Client) liftRWP(page uffd.Range) error {
	err := c.file.RWProtect(page, 0)
	if err == nil {
		c.counters.unlocked.Add(1)
	}
	return err
}

func (c *Client) callBeforeWrite(r *region, i uint64) {
	defer func() {
		if v := recover(); v != nil {
			c.report(fmt.Errorf("pager: BeforeWrite of page %v: panic: %v", r.page(i), v))
		}
	}()
	r.beforeWrite(r.page(i))
}

// provide installs page i of r, and perhaps those around it.
func (c *Client) provide(r *region, i uint64, p pending) error {
	minor := p.Flags.Has(uffd.PagefaultMinor)
	s := r.state(i)
	recorder := c.recorder.Load()
	if recorder != nil && r.source != nil && (s == absent || s == reading) {
		recorder.note(r.home, r.first+i)
	}
	switch s {
	case reading:
		c.hurry(r.page(i).Start, p)
		return errWaits
	case held:
		return errWaits
	case poisoned:
		return c.poison(r, i)
	case present, zeroed:
		if minor {
			return c.mapAgain(r, i)
		}
		// Mostly a duplicate. If not, it comes again.
		r.setState(i, s+1)
		c.counters.woken.Add(1)
		return c.file.Wake(r.page(i))
	case removed, zeroedWoken:
		if minor { // it was not discarded from the file
			return c.mapAgain(r, i)
		}
		return c.fillZeros(r, i, 1, wanted{i, demand})
	case presentWoken:
		if minor {
			return c.mapAgain(r, i)
		}
		return c.provideFromSource(r, i, i, 1, p)
	}
	if minor && r.memory == nil { // somebody else fills the file
		return c.mapAgain(r, i)
	}
	limit := c.aroundPages(r.pageSize)
	if limit == 1 || recorder != nil {
		return c.provideFromSource(r, i, i, 1, p)
	}
	r.touched(i, limit)
	first, n := r.window(i, limit)
	first, n, wasted := r.sample(i, first, n)
	c.counters.wasted.Add(wasted)
	err := c.provideFromSource(r, i, first, n, p)
	if n > 1 && errors.Is(err, syscall.ENOENT) { // the mapping is smaller than that
		err = c.provideFromSource(r, i, i, 1, p)
	}
	return err
}

// mapAgain maps a page that the memory's file has. If it has left the file since
// the fault, the thread asks again, and says so then.
func (c *Client) mapAgain(r *region, i uint64) error {
	if r.memory != nil { // it may be taken back
		file := c.files[r.home]
		file.mu.Lock()
		defer file.mu.Unlock()
	}
	err := c.fill(r, i, 1, nil, wanted{i, demand})
	if errors.Is(err, syscall.EFAULT) {
		return c.file.Wake(r.page(i))
	}
	return err
}

// provideFromSource installs n pages from first on, among them i, which has the
// fault.
func (c *Client) provideFromSource(r *region, i, first, n uint64, p pending) error {
	w := wanted{i, demand}
	if r.zeros(first, n) {
		return c.fillZeros(r, first, n, w)
	}
	lentErr, err := c.fillLent(r, first, n, w)
	if lentErr == nil && (err == nil || !errors.Is(err, syscall.EFAULT)) {
		return err
	}
	// The source has to be read, also if what it lent could not be: then
	// reading says why.
	c.submit(&job{Range: r.span(first, n), wanted: r.page(i).Start, fault: p}, r)
	return errWaits
}

// zeros reports whether the source has nothing but zeros for these pages.
func (r *region) zeros(first, n uint64) bool {
	if r.source == nil {
		return true
	}
	off := r.sourceOffset(first)
	if r.data.holds(off) {
		return false
	}
	kind, length := source.RunAt(r.source, off)
	if kind == source.Data {
		r.data = extent{off, off + length}
		return false
	}
	return uint64(length) >= n*r.pageSize
}

// An extent is a part of a source.
type extent struct{ start, end int64 }

func (e extent) holds(off int64) bool { return e.start <= off && off < e.end }

// wanted says on whose account pages are installed: page is demanded, others
// come along; with another origin than demand, all are its.
type wanted struct {
	page   uint64
	origin origin
}

// A lent is what to do with bytes that are borrowed.
type lent struct {
	r        *region
	first, n uint64
	wanted   wanted
	used     bool  // they were lent
	err      error // the kernel's
}

// fillLent installs pages straight from the memory of the source, if that lends
// them. The first error is the source's.
func (c *Client) fillLent(r *region, first, n uint64, w wanted) (lentErr, err error) {
	defer func() {
		if v := recover(); v != nil {
			lentErr = fmt.Errorf("pager: panic: %v", v)
		}
	}()
	l := &c.loop.lent
	*l = lent{r: r, first: first, n: n, wanted: w}
	lentErr = source.Borrow(r.source, r.sourceOffset(first), int(n*r.pageSize), c.loop.use)
	l.r = nil
	switch {
	case l.used:
		lentErr = nil // it may be what use returned
	case lentErr == nil:
		lentErr = source.ErrNotInMemory
	}
	return lentErr, l.err
}

func (c *Client) useLent(bytes []byte) error {
	l := &c.loop.lent
	if uint64(len(bytes)) != l.n*l.r.pageSize { // other bytes than were asked for
		return source.ErrNotInMemory
	}
	l.used = true
	l.err = c.fillBytes(l.r, l.first, l.n, bytes, l.wanted)
	return l.err // a source may want to know
}

// fillBytes installs n pages with the contents of bytes, or of zeros if that is
// nil and the region has memory. What the memory's file has got before, for a
// parent or a child, stays: they may have written to it.
func (c *Client) fillBytes(r *region, first, n uint64, bytes []byte, w wanted) error {
	if r.memory == nil {
		return c.install(r, first, n, opCopy, bytes, w)
	}
	file := c.files[r.home]
	file.mu.Lock()
	defer file.mu.Unlock()
	for n > 0 {
		k := uint64(1)
		var err error
		if file.has(r, first) {
			if err = c.mapMemory(r, first, 1, w); errors.Is(err, syscall.EFAULT) {
				// It was discarded since. Somebody without faults may write to it now.
				if err = makeZeros(r.memoryAt(first, 1)); err == nil {
					err = c.mapMemory(r, first, 1, w)
				}
			}
		} else {
			for k < n && !file.has(r, first+k) {
				k++
			}
			var part []byte
			if bytes != nil {
				part = bytes[:k*r.pageSize]
			}
			if err = c.writeMemory(r, first, k, part, w); errors.Is(err, uffd.ErrGone) {
				c.takeBack(r, first, k)
			}
		}
		if err != nil {
			return err
		}
		first, n = first+k, n-k
		if bytes != nil {
			bytes = bytes[k*r.pageSize:]
		}
	}
	return nil
}

// writeMemory writes n pages to the region's memory and maps them.
func (c *Client) writeMemory(r *region, first, n uint64, bytes []byte, w wanted) error {
	if err := write(r.memoryAt(first, n), bytes); err != nil {
		return err
	}
	c.files[r.home].add(r, first, n)
	return c.mapMemory(r, first, n, w)
}

// takeBack leaves n pages as they were before they were written for a process that
// is gone. The others may have discarded them since it went.
func (c *Client) takeBack(r *region, first, n uint64) {
	for i := first; i < first+n; i++ {
		if s := r.state(i); s != present && s != zeroed && discard(r.memoryAt(i, 1)) == nil {
			c.files[r.home].drop(r, i)
		}
	}
}

// mapMemory maps n pages that are written.
func (c *Client) mapMemory(r *region, first, n uint64, w wanted) error {
	if c.ledger != nil {
		c.ledger.settle(r, first, n)
		defer c.ledger.settled()
	}
	return c.fill(r, first, n, nil, w)
}

// makeZeros has the kernel make a page of zeros where shared memory has a hole.
func makeZeros(page []byte) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("pager: reading shared memory: %v: %w", v, syscall.EFAULT)
		}
	}()
	touched.Store(uint32(page[0]))
	return nil
}

var touched atomic.Uint32

// write copies src to dst, or sets it to zero. Neither may be there: the one can
// be a file that was truncated, the other on a file system that is full.
func write(dst, src []byte) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("pager: writing shared memory: %v: %w", v, syscall.EFAULT)
		}
	}()
	if src == nil {
		clear(dst)
	} else {
		copy(dst, src)
	}
	return nil
}

// fillZeros installs n pages of zeros.
func (c *Client) fillZeros(r *region, first, n uint64, w wanted) error {
	switch {
	case r.memory != nil:
		return c.fillBytes(r, first, n, nil, w)
	case r.pageSize == uint64(systemPage) && !r.writeProtected():
		return c.install(r, first, n, opZero, nil, w)
	}
	// The kernel has no zero page that is huge or protected.
	for ; n > 0; first, n = first+1, n-1 {
		if err := c.fill(r, first, 1, zeroPage(r.pageSize), w); err != nil {
			return err
		}
	}
	return nil
}

// zeroOver installs a page of zeros of the system's size for which a thread waits,
// although ZEROPAGE says EEXIST: it does so of the mark that write protection
// leaves on a missing page, and COPY does not. The page stays protected. COPY
// would also go over the marks of poison and guards, but there no thread waits.
func (c *Client) zeroOver(a uffd.Addr) (int64, error) {
	n, err := c.file.Copy(a, zeroPage(uint64(systemPage)), uffd.CopyWP)
	if errors.Is(err, syscall.EINVAL) { // nothing can be protected here
		err = syscall.EEXIST
	}
	return n, err
}

// zeroPages has a page of zeros of each size that was asked for.
var zeroPages sync.Map

func zeroPage(size uint64) []byte {
	page, ok := zeroPages.Load(size)
	if !ok {
		page, _ = zeroPages.LoadOrStore(size, make([]byte, size))
	}
	return page.([]byte)
}

// fill installs n pages: copies of bytes, or, if that is nil, what the memory's
// file has.
func (c *Client) fill(r *region, first, n uint64, bytes []byte, w wanted) error {
	if bytes == nil {
		return c.install(r, first, n, opContinue, nil, w)
	}
	return c.install(r, first, n, opCopy, bytes, w)
}

type op uint8

const (
	opCopy op = iota
	opZero
	opContinue
)

// install has the kernel install n pages, and goes on where it stops on the way.
// A page that is there already is passed over, after waking whoever waits for
// it.
func (c *Client) install(r *region, first, n uint64, op op, bytes []byte, w wanted) error {
	for n > 0 {
		span := r.span(first, n)
		var k int64
		var err error
		switch op {
		case opCopy:
			var mode uffd.CopyMode
			if r.writeProtected() {
				mode = uffd.CopyWP
			}
			k, err = c.file.Copy(span.Start, bytes[:span.Len], mode)
		case opZero:
			k, err = c.file.ZeroPage(span, 0)
			if k == 0 && errors.Is(err, syscall.EEXIST) && w.origin == demand && w.page == first {
				k, err = c.zeroOver(span.Start)
			}
		case opContinue:
			var mode uffd.ContinueMode
			if r.writeProtected() {
				mode = uffd.ContinueWP
			}
			k, err = c.file.Continue(span, mode)
		}
		done := uint64(k) / r.pageSize
		c.installed(r, first, done, op, w)
		if err != nil && done == 0 {
			if !errors.Is(err, syscall.EEXIST) {
				return err
			}
			if err := c.exists(r, first); err != nil {
				return err
			}
			done = 1
		}
		first, n = first+done, n-done
		if op == opCopy {
			bytes = bytes[done*r.pageSize:]
		}
	}
	return nil
}

// installed notes pages that are there now.
func (c *Client) installed(r *region, first, n uint64, op op, w wanted) {
	if n == 0 {
		return
	}
	r.filled(first, n)
	switch op {
	case opCopy:
		c.counters.copied.Add(n)
	case opZero:
		c.counters.zeroed.Add(n)
	case opContinue:
		c.counters.continued.Add(n)
	}
	switch {
	case w.origin != demand:
		c.counters.origins[w.origin].Add(n)
	case w.page-first < n:
		c.counters.origins[demand].Add(1)
		if n > 1 {
			c.counters.origins[faultAround].Add(n - 1)
		}
	default:
		c.counters.origins[faultAround].Add(n)
	}
	if len(c.loop.troubles) > 0 {
		for i := first; i < first+n; i++ {
			delete(c.loop.troubles, r.page(i).Start)
		}
	}
}

// filled notes that pages are there.
func (r *region) filled(first, n uint64) {
	for i := r.first + first; n > 0; i, n = i+1, n-1 {
		r.states.filled(i)
	}
}

// exists deals with a page that is there already. Nobody was woken, and it may
// lack its protection.
func (c *Client) exists(r *region, i uint64) error {
	c.counters.existed.Add(1)
	page := r.page(i)
	if r.writeProtected() {
		if err := c.file.WriteProtect(page, uffd.WriteProtectWP); err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	again := r.state(i)
	r.filled(i, 1)
	if again == presentWoken || again == zeroedWoken {
		r.setState(i, again)
		c.strange(page)
	}
	return c.file.Wake(page)
}

// A trouble is a page that cannot be resolved at once.
type trouble struct {
	pending
	since time.Duration
	due   time.Duration // not to be tried before
	tries int
	waits bool // the fault is ours to try again
}

// throttled reports whether the page is to be tried later, and sees to that.
func (c *Client) throttled(page uffd.Addr, p pending) bool {
	t, ok := c.loop.troubles[page]
	if !ok || now() >= t.due {
		return false
	}
	if !t.waits {
		t.pending, t.waits = p, true
		c.loop.troubles[page] = t
	}
	return true
}

// strange is called when threads keep asking for a page that is there. The kernel
// also says so if it has no huge page left: see to it that this takes no more
// than its share of time.
func (c *Client) strange(page uffd.Range) {
	t := c.loop.troubles[page.Start]
	t.tries++
	t.due = now()
	if t.tries > 3 {
		t.due += backoff(troubleMin, t.tries-3)
	}
	c.loop.troubles[page.Start] = t
	if t.tries == 50 {
		c.report(fmt.Errorf("pager: threads keep asking for page %v, which exists, as the kernel says: "+
			"is the pool of huge pages empty, or the memory registered with another userfaultfd?", page))
	}
}

// trouble is called when the kernel refuses a page for a reason that may pass,
// such as memory. It is tried again for as long as sources are.
func (c *Client) trouble(r *region, page uffd.Range, p pending, err error) {
	t := c.loop.troubles[page.Start]
	if t.tries == 0 {
		t.since = now()
	}
	t.tries++
	if r == nil || now()-t.since >= c.retryFor() {
		delete(c.loop.troubles, page.Start)
		if r != nil {
			c.fail(r, r.index(page.Start), p, err)
		}
		return
	}
	t.pending, t.waits = p, true
	t.due = now() + backoff(troubleMin, t.tries)
	c.loop.troubles[page.Start] = t
}

// fail deals with a page whose contents cannot be had.
func (c *Client) fail(r *region, i uint64, p pending, cause error) {
	page := r.page(i)
	action := c.pager.OnFailure
	var err error
	switch action {
	case Zeros:
		r.setState(i, removed)
		err = c.fillZeros(r, i, 1, wanted{i, demand})
	case Poison:
		r.setState(i, poisoned)
		err = c.poison(r, i)
		if r.state(i) == held {
			action = Hold
		}
	default:
		r.setState(i, held)
		c.counters.held.Add(1)
	}
	switch {
	case err == nil, err == errWaits, errors.Is(err, uffd.ErrRetry), errors.Is(err, uffd.ErrGone), errors.Is(err, syscall.ENOENT):
	default: // not even that
		r.setState(i, held)
		action, cause, err = Hold, errors.Join(cause, err), errWaits
	}
	c.report(&PageError{page, action, cause})
	c.settle(r, page, p, err)
}

// poison makes a page raise SIGBUS, or, if the kernel cannot, lets who touches it
// wait.
func (c *Client) poison(r *region, i uint64) error {
	err := c.poisonPage(r.page(i))
	switch {
	case err == nil:
		c.counters.poisoned.Add(1)
	case errors.Is(err, syscall.EEXIST):
		return c.exists(r, i)
	case errors.Is(err, syscall.EINVAL):
		r.setState(i, held)
		c.counters.held.Add(1)
		return errWaits
	}
	return err
}

// poisonPage poisons a page. Where protection has left its mark in place of a
// page, threads find none, but the kernel says EEXIST: the mark has to go. A page
// that does exist, for somebody else has installed it, is without its protection
// for a moment.
func (c *Client) poisonPage(page uffd.Range) error {
	_, err := c.file.Poison(page, 0)
	if !errors.Is(err, syscall.EEXIST) {
		return err
	}
	lifted := c.file.WriteProtect(page, uffd.WriteProtectDontWake)
	if lifted == nil {
		if _, err = c.file.Poison(page, 0); errors.Is(err, syscall.EEXIST) {
			lifted = c.file.WriteProtect(page, uffd.WriteProtectWP)
		}
	}
	if errors.Is(lifted, uffd.ErrRetry) || errors.Is(lifted, uffd.ErrGone) {
		return lifted
	}
	return err // EEXIST also where nothing can be protected
}
