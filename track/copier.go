package track

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
)

// A copier is what the goroutine of a Snapshot owns. It alone reads messages,
// copies pages and lifts their protection. A page whose discarding was announced
// may be gone as soon as the message is read; so nothing is copied between that
// and the reaction to it.
type copier struct {
	areas []area // sorted; written says of a page that it is copied
	next  int    // of areas, whose turn it is
	at    uint64 // in areas[next], how many bytes had their turn
	left  uint64 // bytes that had not

	limit uint64
	used  uint64               // bytes in ahead
	ahead map[uffd.Addr][]byte // pages copied before their turn
	spare [][]byte             // buffers for small pages

	waiting []stall
	looked  time.Time // for messages
	msgs    [16]uffd.Msg
	entries [4096]byte // of pagemap
}

// A stall is a write that waits.
type stall struct {
	uffd.Pagefault
	since time.Time
}

func newCopier(areas []area, limit uint64) copier {
	c := copier{areas: areas, limit: limit, ahead: make(map[uffd.Addr][]byte)}
	for i := range areas {
		areas[i].written = make([]uint64, (areas[i].pages()+63)/64)
		c.left += areas[i].Len
	}
	return c
}

// arm protects the memory. As no fault is answered before the end, no thread has
// got past a write to a page that is protected: the end is the moment of the
// snapshot.
func (s *Snapshot) arm() error {
	c := &s.copier
	if err := readMemory(s.pid, make([]byte, 1), c.areas[0].Start); err != nil {
		return err
	}
	for _, r := range s.ranges {
		if _, err := s.file.Register(r, uffd.RegisterWP); err != nil {
			return err
		}
	}
	start := time.Now()
	for i := range c.areas {
		for {
			err := s.file.WriteProtect(c.areas[i].Range, uffd.WriteProtectWP)
			if err == nil {
				break
			}
			if !errors.Is(err, uffd.ErrRetry) {
				return err
			}
			if err := s.receive(time.Now().Add(retryDelay)); err != nil {
				return err
			}
		}
	}
	c.looked = time.Now()
	s.stats.Arming = c.looked.Sub(start)
	for i := range c.waiting {
		c.waiting[i].since = c.looked
	}
	if err := s.read(make([]byte, pageSize()), c.areas[0].Start); errors.Is(err, ErrSnapshotLost) {
		return fmt.Errorf("%w, or the userfaultfd belongs to another process than %d: %w", err, s.pid, syscall.EINVAL)
	} else if err != nil {
		return err
	}
	return nil
}

// run copies everything, and then keeps the process from waiting until the
// userfaultfd is closed.
func (s *Snapshot) run() {
	defer close(s.over)
	err := s.copy()
	if err != nil && s.pagemap.Gone() {
		err = fmt.Errorf("%w: %w", uffd.ErrGone, err)
	}
	s.mu.Lock()
	s.err = err
	s.mu.Unlock()
	release(s.file, s.ranges)
	close(s.full)
	s.copier.left = 0 // no event is an error any more
	for {
		err := s.receive(time.Time{})
		for _, w := range s.copier.waiting {
			s.file.Wake(uffd.Range{Start: w.Addr &^ uffd.Addr(pageSize()-1), Len: pageSize()})
		}
		s.copier.waiting = nil
		if err != nil {
			return
		}
	}
}

// copy copies everything.
func (s *Snapshot) copy() error {
	c := &s.copier
	for c.left > 0 {
		if err := s.aborted(); err != nil {
			return err
		}
		if len(s.free) > 0 && !readable(s.file) {
			c.looked = time.Now()
			err := s.sweep()
			if err != nil && !errors.Is(err, uffd.ErrRetry) {
				return err
			}
			if err == nil {
				if err := s.retry(); err != nil {
					return err
				}
				continue
			}
		}
		var deadline time.Time
		if len(s.free) > 0 || len(c.waiting) > 0 {
			deadline = time.Now().Add(retryDelay)
		}
		if err := s.receive(deadline); err != nil {
			return err
		}
		if err := s.retry(); err != nil {
			return err
		}
	}
	return nil
}

// receive waits for messages until deadline. It takes events before faults: some
// of those came later.
func (s *Snapshot) receive(deadline time.Time) error {
	c := &s.copier
	if err := s.file.SetReadDeadline(deadline); err != nil {
		return err
	}
	if c.left > 0 && (len(s.free) > 0 || s.aborted() != nil) && deadline.IsZero() {
		return nil // the poke came before SetReadDeadline
	}
	idle := !readable(s.file)
	n, err := s.file.ReadMsgs(c.msgs[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		return err
	}
	var lost error
	for i := range c.msgs[:n] {
		lost = errors.Join(lost, s.event(&c.msgs[i]))
	}
	if idle {
		c.looked = time.Now()
	}
	for i := range c.msgs[:n] {
		if p, ok := c.msgs[i].Pagefault(); ok {
			c.waiting = append(c.waiting, stall{p, c.looked})
		}
	}
	return lost
}

// event reports whether the snapshot is lost.
func (s *Snapshot) event(m *uffd.Msg) error {
	c := &s.copier
	lost := func(r uffd.Range, what string) error {
		if c.left == 0 || !c.missing(r) {
			return nil
		}
		return fmt.Errorf("%w: %v was %s before it was copied", ErrSnapshotLost, r, what)
	}
	if r, ok := m.Remove(); ok {
		return lost(r, "discarded")
	}
	if r, ok := m.Unmap(); ok {
		return lost(r, "unmapped")
	}
	if r, ok := m.Remap(); ok {
		return errors.Join(
			lost(uffd.Range{Start: r.From, Len: r.Len}, "moved"),
			lost(uffd.Range{Start: r.To, Len: r.Len}, "replaced"))
	}
	if m.Event() != uffd.EventFork {
		return nil
	}
	child, err := s.file.Child(m)
	if err == nil {
		err = child.Close() // its memory is no part of the snapshot
	}
	for i := range c.areas {
		if c.areas[i].inherited {
			err = errors.Join(err, lost(c.areas[i].Range, "shared with a forked child"))
		}
	}
	return err
}

// missing reports whether a page in r is not copied.
func (c *copier) missing(r uffd.Range) bool {
	for i := range c.areas {
		a := &c.areas[i]
		from, to := max(r.Start, a.Start), min(r.End(), a.End())
		for ; from < to; from += uffd.Addr(a.page) {
			if !a.isWritten(a.index(from)) {
				return true
			}
		}
	}
	return false
}

// retry lets the writes go on that can.
func (s *Snapshot) retry() error {
	c := &s.copier
	again := c.waiting[:0]
	var first error
	for _, w := range c.waiting {
		done, err := s.resolve(w)
		switch {
		case err != nil && first == nil:
			first = err
		case done:
			s.count(w)
		default:
			again = append(again, w)
		}
	}
	c.waiting = again
	return first
}

func (s *Snapshot) count(w stall) {
	d := time.Since(w.since)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Stalls++
	s.stats.StallTotal += d
	s.stats.StallMax = max(s.stats.StallMax, d)
	s.stats.AheadMax = max(s.stats.AheadMax, s.copier.used)
}

// resolve lets a write go on, after it has copied its page.
func (s *Snapshot) resolve(w stall) (done bool, err error) {
	c := &s.copier
	a := areaAt(c.areas, w.Addr)
	if a == nil {
		return true, s.file.Wake(uffd.Range{Start: w.Addr &^ uffd.Addr(pageSize()-1), Len: pageSize()})
	}
	i := a.index(w.Addr)
	page := a.span(i, i+1)
	if a.isWritten(i) {
		err := s.file.WriteProtect(page, 0)
		if errors.Is(err, syscall.ENOENT) { // it is not mapped any more
			err = s.file.Wake(page)
		}
		return err == nil, ignoreRetry(err)
	}
	if c.used+a.page > c.limit {
		return false, nil // the sweep will come
	}
	data := c.buffer(a.page)
	err = s.read(data, page.Start)
	if err == nil {
		err = s.file.WriteProtect(page, 0)
	}
	if err != nil {
		c.recycle(data)
		return false, ignoreRetry(err)
	}
	a.setWritten(i)
	c.ahead[page.Start] = data
	c.used += a.page
	return true, nil
}

func ignoreRetry(err error) error {
	if errors.Is(err, uffd.ErrRetry) {
		return nil
	}
	return err
}

// buffer returns memory for a page.
func (c *copier) buffer(size uint64) []byte {
	if n := len(c.spare); n > 0 && size == pageSize() {
		b := c.spare[n-1]
		c.spare = c.spare[:n-1]
		return b
	}
	return make([]byte, size)
}

func (c *copier) recycle(b []byte) {
	if uint64(len(b)) == pageSize() {
		c.spare = append(c.spare, b)
	}
}

// sweep fills a buffer with the next bytes.
func (s *Snapshot) sweep() error {
	c := &s.copier
	buf := <-s.free
	n := 0
	var err error
	for n < len(buf) && c.left > 0 {
		var k uint64
		if k, err = s.take(buf[n:]); err != nil {
			break
		}
		n += int(k)
		c.left -= k
		if c.at += k; c.at == c.areas[c.next].Len {
			c.next, c.at = c.next+1, 0
		}
	}
	if n == 0 {
		s.free <- buf
		return err
	}
	s.full <- buf[:n]
	return err
}

// take copies the next bytes to p, and returns how many.
func (s *Snapshot) take(p []byte) (uint64, error) {
	c := &s.copier
	a := &c.areas[c.next]
	i, within := c.at/a.page, c.at%a.page
	if a.isWritten(i) {
		page := a.Start + uffd.Addr(i*a.page)
		data := c.ahead[page]
		n := uint64(copy(p, data[within:]))
		if within+n == a.page {
			delete(c.ahead, page)
			c.recycle(data)
			c.used -= a.page
		}
		return n, nil
	}
	end := i + 1
	for end < a.pages() && !a.isWritten(end) && (end-i)*a.page < uint64(len(p)) {
		end++
	}
	n := min(end*a.page-c.at, uint64(len(p)))
	if err := s.read(p[:n], a.Start+uffd.Addr(c.at)); err != nil {
		return 0, err
	}
	whole := (c.at + n) / a.page // the last page may be a huge one that goes on
	if whole > i {
		if err := s.file.WriteProtect(a.span(i, whole), 0); err != nil {
			return 0, err
		}
		for ; i < whole; i++ {
			a.setWritten(i)
		}
	}
	return n, nil
}

// read copies memory that was protected all the while since it was armed.
//
// That is so if it is protected after the copying: nothing else protects memory.
// If other protected memory was moved there, or somebody is about to change the
// mappings, the lifting of the protection fails afterwards, with ErrRetry.
func (s *Snapshot) read(p []byte, a uffd.Addr) error {
	if err := readMemory(s.pid, p, a); err != nil {
		return err
	}
	const protected = 1 << 57
	a &^= uffd.Addr(pageSize() - 1)
	for pages := (uint64(len(p)) + pageSize() - 1) / pageSize(); pages > 0; {
		entries := s.copier.entries[:min(8*pages, uint64(len(s.copier.entries)))]
		if err := s.pagemap.read(entries, a); err != nil {
			return err
		}
		for i := 0; i < len(entries); i += 8 {
			if binary.NativeEndian.Uint64(entries[i:])&protected == 0 {
				return fmt.Errorf("%w: %v has lost its protection", ErrSnapshotLost, a)
			}
			a += uffd.Addr(pageSize())
		}
		pages -= uint64(len(entries)) / 8
	}
	return nil
}
