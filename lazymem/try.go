package lazymem

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// run calls f until it does not fault, and returns what it returned, or why a
// page could not be filled.
func (m *Memory) run(f func(mem []byte) error) error {
	s := stream{next: -1, again: -1}
	for {
		fault, err := m.try(f)
		if fault < 0 {
			return err
		}
		if err := m.serve(&s, fault>>m.pageShift); err != nil {
			return err
		}
	}
}

// try calls f once and returns what it returned, or the offset at which it
// faulted; without a fault that is -1. Other panics pass.
func (m *Memory) try(f func(mem []byte) error) (fault int, err error) {
	last := lastFault()
	outer := peek(last)
	poke(last, 0)
	old := debug.SetPanicOnFault(true)
	returned := false
	defer func() {
		debug.SetPanicOnFault(old)
		addr := peek(last)
		swallowed := m.offset(addr)
		if addr == 0 || swallowed >= 0 { // else a Do around this one has to see it
			poke(last, outer)
		}
		if returned {
			if swallowed >= 0 {
				err = swallowedError(swallowed, err)
			}
			return
		}
		r := recover()
		fault = -1
		if r == nil { // runtime.Goexit, or panic(nil) with GODEBUG=panicnil=1
			err = new(runtime.PanicNilError)
			return
		}
		if e, ok := r.(interface {
			runtime.Error
			Addr() uintptr
		}); ok {
			fault = m.offset(e.Addr())
		}
		if fault < 0 {
			panic(r)
		}
	}()
	err = f(m.mem[:m.size:m.size])
	returned = true
	return -1, err
}

// copy copies between p and the memory at off.
func (m *Memory) copy(p []byte, off int64, write bool) error {
	dst, src := p, m.mem[off:m.size]
	if write {
		dst, src = src, p
	}
	if tryCopy(dst, src) {
		return nil
	}
	return m.run(func([]byte) error {
		copy(dst, src)
		return nil
	})
}

// tryCopy is try for what does not fault as a rule, and has nobody to swallow a
// fault. It reports false if there was one, whosever.
func tryCopy(dst, src []byte) (ok bool) {
	last := lastFault()
	outer := peek(last)
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if !ok && recover() != nil {
			poke(last, outer)
		}
	}()
	copy(dst, src)
	return true
}

// offset returns where in the memory an address is, or -1.
func (m *Memory) offset(addr uintptr) int {
	if addr-m.base < uintptr(len(m.mem)) {
		return int(addr - m.base)
	}
	return -1
}

func swallowedError(off int, err error) error {
	if err != nil {
		err = fmt.Errorf("%w; the function returned: %w", ErrSwallowed, err)
	} else {
		err = ErrSwallowed
	}
	return &Error{Off: int64(off), Err: err}
}

// pagesIn returns the number of pages that the first n bytes lie in.
func (m *Memory) pagesIn(n int) int { return (n + m.pageSize - 1) >> m.pageShift }

// A stream is how one call of Do goes through the memory.
type stream struct {
	next  int // the page behind what the last fault filled
	pages int // how many that were

	again    int    // the page that was there already at the last fault, or -1
	discards uint64 // Memory.discards then
}

// serve fills the page at which a function faulted, and reads ahead if the
// function goes through the memory from front to back.
func (m *Memory) serve(s *stream, page int) error {
	if s.next >= 0 && s.next <= page && m.skipPresent(s.next, page) == page {
		s.pages = min(2*s.pages, m.pages)
	} else {
		s.pages = m.window
	}
	end, present, err := m.fill(m.ctx, page, page+1)
	if err != nil {
		return err
	}
	if present {
		return m.seenAgain(s, page)
	}
	s.again = -1
	for last := min(page+s.pages, m.pages); end < last; {
		if end, _, err = m.fill(m.ctx, end, last); err != nil {
			break // nobody has asked for it yet
		}
	}
	s.next = end
	return nil
}

// seenAgain finds out that a page cannot be present, if the kernel says twice in
// a row that it is not and there was no Discard in between.
func (m *Memory) seenAgain(s *stream, page int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.has(page) {
		return nil
	}
	if s.again == page && s.discards == m.discards {
		return m.errorAt(page, ErrLost)
	}
	s.again, s.discards = page, m.discards
	return nil
}
