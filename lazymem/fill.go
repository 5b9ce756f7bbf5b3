package lazymem

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"time"
	"unsafe"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/source"
)

// A fill is the filling of pages [first, last), by one goroutine.
type fill struct {
	m           *Memory
	first, last int
	need        int // the page that it is for; the others are welcome
	goroutine   unsafe.Pointer

	at  int // where in the memory the next bytes go
	buf []byte
	use func(p []byte) error // copyIn, made once

	// Under Memory.mu:
	waiting int   // goroutines
	over    bool  // nobody works on it any more
	err     error // why need is missing, for those who wait for it too
}

// fill has the page filled, and if it is missing others up to last, or more to
// make a window. It returns the first page behind those that it knows to be there;
// present says that somebody else had filled the page.
func (m *Memory) fill(ctx context.Context, page, last int) (end int, present bool, err error) {
	m.mu.Lock()
	for {
		if err := m.stopped(ctx); err != nil {
			m.mu.Unlock()
			return page, false, m.errorAt(page, err)
		}
		if m.has(page) {
			m.mu.Unlock()
			return page + 1, true, nil
		}
		f := m.filling(page, page+1)
		if f == nil {
			break
		}
		if f.goroutine == getg() {
			m.mu.Unlock()
			return page, false, m.errorAt(page, errCircle)
		}
		if err := m.wait(ctx, f, page); err != nil {
			m.mu.Unlock()
			return page, false, m.errorAt(page, err)
		}
	}
	f := m.begin(page, last)
	m.mu.Unlock()
	defer m.end(f) // also when the source panics
	end, err = f.run(ctx)
	if err != nil {
		return page, false, m.errorAt(page, err)
	}
	return end, false, nil
}

func (m *Memory) errorAt(page int, err error) error {
	return &Error{Off: int64(page) << m.pageShift, Err: err}
}

// stopped says why nothing is to be filled any more.
func (m *Memory) stopped(ctx context.Context) error {
	err := ctx.Err() // first: Close ends contexts after it has set closed
	if m.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// filling returns a fill under way of one of the pages, or nil.
func (m *Memory) filling(first, last int) *fill {
	for _, f := range m.fills {
		if f.first < last && first < f.last {
			return f
		}
	}
	return nil
}

// othersFill reports whether another goroutine fills pages.
func (m *Memory) othersFill() bool {
	for _, f := range m.fills {
		if f.goroutine != getg() {
			return true
		}
	}
	return false
}

// wait waits until f is over, or there is no use in it. It returns f's error if
// that is about page.
func (m *Memory) wait(ctx context.Context, f *fill, page int) error {
	if ctx != m.ctx {
		defer context.AfterFunc(ctx, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.ended.Broadcast()
		})()
	}
	f.waiting++
	for !f.over && m.stopped(ctx) == nil {
		m.ended.Wait()
	}
	f.waiting--
	var err error
	if f.over && f.need == page {
		err = f.err
	}
	m.recycle(f)
	return err
}

// begin starts a fill of the missing pages around page.
func (m *Memory) begin(page, last int) *fill {
	var f *fill
	if n := len(m.idle); n > 0 {
		f = m.idle[n-1]
		m.idle = m.idle[:n-1]
	} else {
		f = &fill{m: m}
		f.use = f.copyIn
	}
	first := page / m.window * m.window
	last = min(max(last, first+m.window), m.pages)
	for _, other := range m.fills {
		if other.first > page {
			last = min(last, other.first)
		} else {
			first = max(first, other.last)
		}
	}
	f.first, f.last, f.need = page, page+1, page
	for f.first > first && !m.has(f.first-1) {
		f.first--
	}
	for f.last < min(last, f.first+m.chunk) && !m.has(f.last) {
		f.last++
	}
	f.goroutine = getg()
	f.over, f.err = false, nil
	m.fills = append(m.fills, f)
	return f
}

// end finishes a fill.
func (m *Memory) end(f *fill) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.fills {
		if m.fills[i] == f {
			last := len(m.fills) - 1
			m.fills[i] = m.fills[last]
			m.fills = m.fills[:last]
			break
		}
	}
	f.over = true
	m.ended.Broadcast()
	m.recycle(f)
}

func (m *Memory) recycle(f *fill) {
	if f.over && f.waiting == 0 {
		m.idle = append(m.idle, f)
	}
}

// run fills the pages, and returns the first behind f.need that is missing. It
// fails only if f.need is.
func (f *fill) run(ctx context.Context) (end int, err error) {
	m := f.m
	err = f.install(ctx, f.first, f.last)
	if err != nil && !m.has(f.need) && f.last-f.first > 1 && m.stopped(ctx) == nil {
		err = f.install(ctx, f.need, f.need+1) // it may have been a neighbour's failure
	}
	if err == nil || m.has(f.need) {
		return m.skipPresent(f.need, f.last), nil
	}
	if stopped := m.stopped(ctx); stopped != nil {
		return f.need, stopped
	}
	f.err = err
	return f.need, err
}

// install gets the contents of pages [first, last) and puts them in.
func (f *fill) install(ctx context.Context, first, last int) error {
	m := f.m
	f.at = first << m.pageShift
	for end := last << m.pageShift; f.at < end; {
		kind, run := source.RunAt(m.src, int64(f.at))
		alike := end
		if run < int64(end-f.at) {
			alike = f.at + int(run)
		}
		var err error
		if zeros := (alike - f.at) >> m.pageShift << m.pageShift; kind != source.Data && zeros > 0 && m.zeroPages() {
			err = f.zero(zeros)
		} else { // whole pages: what follows in the last of them belongs to it
			err = f.data(ctx, m.pagesIn(alike-f.at)<<m.pageShift)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// zeroPages reports whether the kernel can install pages of zeros.
func (m *Memory) zeroPages() bool { return m.pageSize == os.Getpagesize() }

// data puts n bytes of the source in.
func (f *fill) data(ctx context.Context, n int) error {
	m := f.m
	err := source.Borrow(m.src, int64(f.at), n, f.use)
	if !errors.Is(err, source.ErrNotInMemory) {
		return err
	}
	if len(f.buf) < n {
		f.buf = make([]byte, n)
	}
	p := f.buf[:n]
	inside := p[:min(n, m.size-f.at)]
	clear(p[len(inside):])
	got, err := m.src.ReadAt(ctx, inside, int64(f.at))
	if got < len(inside) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return f.copyIn(p)
}

// copyIn puts p in.
func (f *fill) copyIn(p []byte) error {
	return f.put(len(p), func(to uffd.Addr, done int) (int64, error) {
		return f.m.file.Copy(to, p[done:], uffd.CopyDontWake)
	})
}

// zero puts n bytes of zeros in.
func (f *fill) zero(n int) error {
	return f.put(n, func(to uffd.Addr, done int) (int64, error) {
		return f.m.file.ZeroPage(uffd.Range{Start: to, Len: uint64(n - done)}, uffd.ZeroPageDontWake)
	})
}

// put puts n bytes in. op puts in what is left of them when some are done, or the
// first part of that.
func (f *fill) put(n int, op func(to uffd.Addr, done int) (int64, error)) error {
	m := f.m
	tries := 0
	for done := 0; done < n; {
		more, err := op(uffd.Addr(m.base+uintptr(f.at)), done)
		m.filled(f.at>>m.pageShift, int(more)>>m.pageShift)
		f.at += int(more)
		done += int(more)
		switch {
		case err == nil:
		case more > 0:
			tries = 0
		case errors.Is(err, uffd.ErrRetry) && tries < maxTries && !m.closed.Load():
			// Another thread changes the process's mappings.
			runtime.Gosched()
			time.Sleep(time.Duration(tries) * time.Microsecond)
			tries++
		default:
			return err
		}
	}
	return nil
}

// maxTries is how often the kernel may ask to try again before that counts as
// failure; it makes for a second or so.
const maxTries = 1000

// filled notes that n pages from page on are there.
func (m *Memory) filled(page, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for end := page + n; page < end; page++ {
		m.present[page/64].Or(1 << (page % 64))
		m.missing--
	}
}
