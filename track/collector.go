package track

import (
	"cmp"
	"fmt"
	"iter"
	"os"
	"sync"
	"sync/atomic"

	"github.com/go-uffd/uffd"
)

// A body is that of a loop over ranges.
type body = func(uffd.Range, error) bool

// A collector makes the collections of a Writes or an Accesses.
type collector struct {
	pagemap *Pagemap
	running sync.Mutex
	stopped atomic.Bool // what is found means nothing any more
	buf     []Region
	used    int // of buf; the rest is zero
	found   int // of buf are collected
	handed  int // of those are handed out
}

// loop returns the loop over a collection. One runs at a time. collect passes
// ranges to yield, without an error, and reports false if that did.
func (c *collector) loop(collect func(yield body) (more bool, err error)) iter.Seq2[uffd.Range, error] {
	return func(yield func(uffd.Range, error) bool) {
		if !c.running.TryLock() {
			yield(uffd.Range{}, fmt.Errorf("track: collecting: %w", invalid("another loop is collecting")))
			return
		}
		defer c.running.Unlock()
		if !c.handOut(yield) {
			return
		}
		more, err := collect(yield)
		if more && err == nil {
			err = c.pagemap.alive()
		}
		if c.stopped.Load() {
			err = os.ErrClosed
		}
		if more && err != nil {
			yield(uffd.Range{}, fmt.Errorf("track: collecting: %w", err))
		}
	}
}

// scan passes to yield what s finds. If reset is not nil, it resets what was
// found before that, and returns how many of the regions it has.
func (c *collector) scan(s Scan, reset func([]Region) (int, error), yield body) (more bool, err error) {
	if c.buf == nil {
		c.buf = make([]Region, 4096)
	}
	for s.Range.Len > 0 {
		// To clear all of buf, as Scan does, would take as long as a scan.
		clear(c.buf[:c.used])
		n, next, err := c.pagemap.scanInto(&s, c.buf)
		c.used = n
		if reset != nil {
			done, failed := reset(c.buf[:n])
			n, err = done, cmp.Or(failed, err)
		}
		c.found, c.handed = n, 0
		if !c.handOut(yield) {
			return false, nil
		}
		if err != nil {
			return true, err
		}
		s.Range = s.Range.Skip(int64(next - s.Range.Start))
	}
	return true, nil
}

// handOut hands out what is left. It reports false if yield did.
func (c *collector) handOut(yield body) bool {
	left := c.buf[:c.found]
	for i := c.handed; i < len(left); i++ {
		c.handed = i + 1 // first, for yield need not return
		if !yield(left[i].Range(), nil) {
			return false
		}
	}
	return true
}
