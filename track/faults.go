package track

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
)

// faults keeps the books of written pages where the kernel does not: each first
// write to a page is a fault, which it answers.
type faults struct {
	file    *uffd.File
	pagemap *Pagemap
	areas   []area        // sorted
	zeros   []byte        // a page
	booked  chan struct{} // what was read before this was sent is booked
	done    chan struct{}

	// mu makes a change of a page's bit and of its protection one step.
	mu      sync.Mutex
	failed  error            // why faults are not answered any more
	entries [8 * maxRun]byte // of pagemap
}

// An area is memory of one mapping.
type area struct {
	uffd.Range
	page uint64 // size of its pages

	// anonymous memory can lose its protection together with its pages. So
	// missing pages are faults there.
	anonymous bool

	inherited bool // forked children share it
	rwp       bool // registered with RegisterRWP

	// A bit for each page. leaving says of a page of anonymous memory that its
	// discarding was announced, and that it has not been seen to be gone.
	written, leaving []uint64
}

func (a *area) pages() uint64             { return a.Len / a.page }
func (a *area) index(at uffd.Addr) uint64 { return uint64(at-a.Start) / a.page }
func (a *area) isWritten(i uint64) bool   { return isSet(a.written, i) }
func (a *area) setWritten(i uint64)       { set(a.written, i) }

func isSet(words []uint64, i uint64) bool { return words[i/64]&(1<<(i%64)) != 0 }
func set(words []uint64, i uint64)        { words[i/64] |= 1 << (i % 64) }
func unset(words []uint64, i uint64)      { words[i/64] &^= 1 << (i % 64) }

// span returns pages from first up to, but not including, end.
func (a *area) span(first, end uint64) uffd.Range {
	return uffd.Range{Start: a.Start + uffd.Addr(first*a.page), Len: (end - first) * a.page}
}

func startFaults(f *uffd.File, pagemap *Pagemap, pid int, ranges []uffd.Range) (*faults, error) {
	areas, err := readAreas(pid, ranges)
	if err != nil {
		return nil, err
	}
	for i := range areas {
		a := &areas[i]
		words := (a.pages() + 63) / 64
		a.written = make([]uint64, words)
		if a.anonymous {
			a.leaving = make([]uint64, words)
		}
	}
	s := &faults{file: f, pagemap: pagemap, areas: areas, zeros: make([]byte, pageSize()),
		booked: make(chan struct{}, 1), done: make(chan struct{})}
	go s.answer()
	if err := s.protect(); err != nil {
		s.fail(err)
		s.interrupt()
		return nil, err
	}
	return s, nil
}

// protect registers the memory, and protects it.
func (s *faults) protect() error {
	for _, a := range s.areas {
		mode := uffd.RegisterWP
		if a.anonymous {
			mode |= uffd.RegisterMissing
		}
		if _, err := s.file.Register(a.Range, mode); err != nil {
			return err
		}
	}
	for _, a := range s.areas {
		if err := patiently(func() error { return protect(s.file, a.Range, a.page) }); err != nil {
			return err
		}
	}
	return nil
}

// readAreas returns what is mapped in ranges, sorted like them.
func readAreas(pid int, ranges []uffd.Range) ([]area, error) {
	text, err := os.ReadFile(procFile(pid, "smaps"))
	if err != nil {
		return nil, err
	}
	return parseAreas(string(text), ranges)
}

func parseAreas(smaps string, ranges []uffd.Range) (areas []area, err error) {
	var mapped area
	found := make([]bool, len(ranges))
	for line := range strings.Lines(smaps) {
		var start, end, inode, kib uint64
		var mode, rest string
		if n, _ := fmt.Sscanf(line, "%x-%x %s %s %s %d", &start, &end, &mode, &rest, &rest, &inode); n == 6 {
			mapped = area{
				Range:     uffd.Range{Start: uffd.Addr(start), Len: end - start},
				anonymous: inode == 0,
				inherited: strings.HasSuffix(mode, "s"),
			}
			continue
		}
		if line, ok := strings.CutPrefix(line, "VmFlags:"); ok {
			flags := strings.Fields(line)
			for i := range areas {
				if !mapped.Contains(areas[i].Start) {
					continue
				}
				if slices.Contains(flags, "dc") { // MADV_DONTFORK
					areas[i].inherited = false
				}
				areas[i].rwp = slices.Contains(flags, "ur")
			}
			continue
		}
		if n, _ := fmt.Sscanf(line, "KernelPageSize: %d kB", &kib); n != 1 {
			continue
		}
		for i, r := range ranges {
			from, to := max(r.Start, mapped.Start), min(r.End(), mapped.End())
			if from >= to {
				continue
			}
			found[i] = true
			part := mapped
			part.Range, part.page = uffd.Range{Start: from, Len: uint64(to - from)}, kib<<10
			if part.page == 0 || uint64(from)%part.page != 0 || part.Len%part.page != 0 {
				return nil, invalid(fmt.Sprintf("%v has part of a page of %d KiB", r, kib))
			}
			areas = append(areas, part)
		}
	}
	if i := slices.Index(found, false); i >= 0 {
		return nil, invalid(fmt.Sprintf("nothing is mapped in %v", ranges[i]))
	}
	return areas, nil
}

// areaAt returns the area of an address, nil if it is in none.
func areaAt(areas []area, addr uffd.Addr) *area {
	i, _ := slices.BinarySearchFunc(areas, addr, func(a area, addr uffd.Addr) int {
		if a.End() <= addr {
			return -1
		}
		return 1
	})
	if i < len(areas) && areas[i].Contains(addr) {
		return &areas[i]
	}
	return nil
}

// answer answers faults until the userfaultfd is closed. Once s has failed it only
// keeps the process from waiting.
func (s *faults) answer() {
	defer close(s.done)
	msgs := make([]uffd.Msg, 16)
	var waiting []uffd.Pagefault
	for {
		select {
		case s.booked <- struct{}{}:
		default:
		}
		var deadline time.Time
		if len(waiting) > 0 {
			deadline = time.Now().Add(retryDelay)
		}
		if err := s.file.SetReadDeadline(deadline); err != nil {
			return // closed
		}
		n, err := s.file.ReadMsgs(msgs)
		switch {
		case errors.Is(err, os.ErrClosed) || err != nil && s.failure() != nil:
			return
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			s.fail(err)
			return
		}
		for i := range msgs[:n] {
			if r, ok := msgs[i].Remove(); ok {
				s.discarded(r)
			} else if p, ok := msgs[i].Pagefault(); ok {
				waiting = append(waiting, p)
			}
		}
		again := waiting[:0]
		for _, p := range waiting {
			err := s.resolve(p)
			switch {
			case errors.Is(err, uffd.ErrRetry):
				again = append(again, p)
			case errors.Is(err, uffd.ErrGone):
				return // nobody waits any more
			case err != nil:
				s.fail(err)
			}
		}
		waiting = again
		if s.failure() != nil {
			waiting = nil // they were woken
		}
	}
}

// resolve lets the access go on, and books it if it is a write.
func (s *faults) resolve(p uffd.Pagefault) error {
	a := areaAt(s.areas, p.Addr)
	if a == nil {
		return s.file.Wake(uffd.Range{Start: p.Addr &^ uffd.Addr(pageSize()-1), Len: pageSize()})
	}
	i := a.index(p.Addr)
	page := a.span(i, i+1)

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return s.file.Wake(page)
	}
	if a.anonymous {
		// Whoever touches what it discards has seen the end of that: the page is
		// gone, or it was MADV_FREE and writing keeps the page.
		unset(a.leaving, i)
	}
	write := p.Flags.Has(uffd.PagefaultWrite)
	if write {
		a.setWritten(i)
	}
	var err error
	switch {
	case p.Flags.Has(uffd.PagefaultWP):
		err = s.file.WriteProtect(page, 0)
	case write:
		_, err = s.file.Copy(page.Start, s.zeros, 0)
	default:
		_, err = s.file.Copy(page.Start, s.zeros, uffd.CopyWP)
	}
	if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOENT) {
		err = s.file.Wake(page) // resolved, or not our memory any more
	}
	return err
}

// discarded books what was discarded. It is protected, or missing, until
// somebody touches it again. It goes only after this was announced, though, and
// may be collected before that.
func (s *faults) discarded(r uffd.Range) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for j := range s.areas {
		a := &s.areas[j]
		from, to := max(r.Start, a.Start), min(r.End(), a.End())
		for ; from < to; from += uffd.Addr(a.page) {
			a.setWritten(a.index(from))
			if a.anonymous {
				set(a.leaving, a.index(from))
			}
		}
	}
}

// settle waits until all that was read is booked: who discards pages goes on when
// that is read.
func (s *faults) settle() {
	select {
	case <-s.booked: // of before
	default:
	}
	for {
		if s.file.SetReadDeadline(time.Unix(1, 0)) != nil { // answer may set another at any time
			return
		}
		select {
		case <-s.booked:
			return
		case <-s.done:
			return
		case <-time.After(retryDelay):
		}
	}
}

// maxRun bounds how long faults wait for a collection, in pages.
const maxRun = 512

// collect reports false if yield did.
func (s *faults) collect(yield body) (more bool, err error) {
	s.settle()
	for j := range s.areas {
		a := &s.areas[j]
		for i := uint64(0); i < a.pages(); {
			var first, end uint64
			err := patiently(func() (err error) {
				first, end, err = s.reset(a, i)
				return err
			})
			if err != nil {
				return true, err
			}
			if first < end && !yield(a.span(first, end), nil) {
				return false, nil
			}
			i = end
		}
	}
	return true, nil
}

// reset finds the first run of written pages of a, from page i on, and makes them
// protected and not written.
func (s *faults) reset(a *area, i uint64) (first, end uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return 0, 0, s.failed
	}
	first, end = run(a.written, i, a.pages())
	if first == end {
		return first, end, nil
	}
	if err := s.look(a, first, end); err != nil {
		return first, end, err
	}
	if err := protect(s.file, a.span(first, end), a.page); err != nil {
		return first, end, err
	}
	for k := first; k < end; k++ {
		if !a.anonymous || !isSet(a.leaving, k) { // else it is going to change
			unset(a.written, k)
		}
	}
	return first, end, nil
}

// look looks which of the pages that are leaving are gone.
func (s *faults) look(a *area, first, end uint64) error {
	if !a.anonymous || !slices.ContainsFunc(a.leaving[first/64:(end+63)/64], func(w uint64) bool { return w != 0 }) {
		return nil
	}
	entries := s.entries[:8*(end-first)]
	if err := s.pagemap.read(entries, a.span(first, end).Start); err != nil {
		return err
	}
	const there = 1<<63 | 1<<62 // in memory, or swapped out
	for k := first; k < end; k++ {
		if binary.NativeEndian.Uint64(entries[8*(k-first):])&there == 0 {
			unset(a.leaving, k)
		}
	}
	return nil
}

// run returns the first run of ones at or after bit i, of n bits: at most maxRun
// of it. It is empty, at n, if there is none.
func run(words []uint64, i, n uint64) (first, end uint64) {
	for i < n {
		if rest := words[i/64] >> (i % 64); rest != 0 {
			i += uint64(bits.TrailingZeros64(rest))
			break
		}
		i = (i/64 + 1) * 64
	}
	first = min(i, n)
	for end = first; end < n && end-first < maxRun && words[end/64]&(1<<(end%64)) != 0; {
		end++
	}
	return first, end
}

// fail ends the tracking, and lets the process go on.
func (s *faults) fail(err error) {
	s.mu.Lock()
	if s.failed == nil {
		s.failed = fmt.Errorf("tracking has ended: %w", err)
	}
	s.mu.Unlock()
	for _, a := range s.areas {
		release(s.file, []uffd.Range{a.Range})
	}
}

func (s *faults) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// interrupt ends answer without closing the userfaultfd, once s has failed.
func (s *faults) interrupt() {
	for over := false; !over; {
		s.file.SetReadDeadline(time.Unix(1, 0)) // answer may set another at any time
		select {
		case <-s.done:
			over = true
		case <-time.After(retryDelay):
		}
	}
	s.file.SetReadDeadline(time.Now().Add(retryDelay))
	for err := error(nil); err == nil; { // somebody may wait for an event to be read
		_, err = s.file.ReadMsgs(make([]uffd.Msg, 16))
	}
	s.file.SetReadDeadline(time.Time{})
}

// wait waits for the end of answer.
func (s *faults) wait() { <-s.done }
