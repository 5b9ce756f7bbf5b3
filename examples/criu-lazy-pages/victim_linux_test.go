package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/internal/uffdtest"
)

// The processes that are dumped are this program, in one of these roles. Whatever
// it finds wrong with its memory it writes to a file.
const dirVariable = "VICTIM_DIR"

// victim starts a process of a role, and waits until its memory is as it is to be
// dumped.
func victim(t *testing.T, role string) (c *checkpoint, dir string) {
	t.Helper()
	uffdtest.RequireRoot(t)
	dir = t.TempDir()
	c = start(t, uffdtest.Command(role, dirVariable+"="+dir))
	c.await(filepath.Join(dir, "ready"))
	return c, dir
}

// await waits for a file.
func (c *checkpoint) await(name string) []byte {
	c.Helper()
	for deadline := time.Now().Add(uffdtest.Patience); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if text, err := os.ReadFile(name); err == nil {
			return text
		}
	}
	c.Fatalf("%s does not come", name)
	return nil
}

// signal makes a file that a victim waits for.
func signalFile(t *testing.T, dir, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

// verdict waits until a victim has looked at its memory.
func (r *restored) verdict(dir string) {
	r.Helper()
	text := r.await(filepath.Join(dir, "verdict"))
	r.Logf("the process has verified its memory after %v", time.Since(r.begin).Round(time.Millisecond))
	if len(text) > 0 {
		r.Errorf("the restored process:\n%s", text)
	}
}

// Of the victims.

// say makes a file at once.
func say(name, text string) error {
	name = filepath.Join(os.Getenv(dirVariable), name)
	if err := os.WriteFile(name+".tmp", []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(name+".tmp", name)
}

// hear waits for a file.
func hear(name string) {
	for {
		if _, err := os.Stat(filepath.Join(os.Getenv(dirVariable), name)); err == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// verdict says what is wrong.
func verdict(errs ...error) error {
	text := ""
	if err := errors.Join(errs...); err != nil {
		text = err.Error()
	}
	return say("verdict", text)
}

func pageCount(n uint64) uint64 { return n * pageSize }

// A piece is memory that holds a pattern, or zeros if seed is 0.
type piece struct {
	addr, len, seed uint64
}

// mapPiece maps private anonymous memory and fills it.
func mapPiece(pages, seed uint64) (piece, error) {
	return mapAt(0, pages, seed, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

func mapAt(addr, pages, seed uint64, flags int) (piece, error) {
	p, err := unix.MmapPtr(-1, 0, at(addr), uintptr(pages*pageSize), unix.PROT_READ|unix.PROT_WRITE, flags)
	m := piece{uint64(uintptr(p)), pages * pageSize, seed}
	if err == nil && seed != 0 {
		m.fill()
	}
	return m, err
}

// part returns some pages of a piece of zeros.
func (m piece) zeros(first, pages uint64) piece {
	return piece{m.addr + first*pageSize, pages * pageSize, 0}
}

func at(addr uint64) unsafe.Pointer {
	p := uintptr(addr)
	return *(*unsafe.Pointer)(unsafe.Pointer(&p))
}

func (m piece) fill() {
	for i := uint64(0); i < m.len; i += 8 {
		*(*uint64)(at(m.addr + i)) = word(m.seed, i)
	}
}

// word returns the word at offset i of a pattern.
func word(seed, i uint64) uint64 {
	x := seed*0x9e3779b97f4a7c15 + i
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	return x ^ x>>29
}

// wrong returns the number of words that are not what they should be, and where
// the first is.
//
//go:nosplit
//go:norace
func (m *piece) wrong(first *uint64) (n uint64) {
	for i := uint64(0); i < m.len; i += 8 {
		want := uint64(0)
		if m.seed != 0 {
			want = word(m.seed, i)
		}
		p := uintptr(m.addr + i)
		if **(**uint64)(unsafe.Pointer(&p)) != want {
			if n == 0 {
				*first = m.addr + i
			}
			n++
		}
	}
	return n
}

func check(name string, pieces ...piece) error {
	for _, m := range pieces {
		var first uint64
		if n := m.wrong(&first); n > 0 {
			return fmt.Errorf("%s: %d of %d words wrong in %#x, the first at %#x: %#x",
				name, n, m.len/8, m.addr, first, *(*uint64)(at(first)))
		}
	}
	return nil
}

// A script is what a forked process does: it forks itself, both check pieces, and
// exit. It is all the memory that they use, besides the pieces.
type script struct {
	pieces [16]piece
	n      int
	nested uintptr // how many generations more
	first  uint64
	status int32
}

// forked has a child, and its children, check pieces.
func forked(name string, generations int, pieces ...piece) error {
	s := &script{nested: uintptr(generations - 1)}
	if s.n = copy(s.pieces[:], pieces); s.n < len(pieces) {
		return errors.New("too many pieces")
	}
	// As in package uffdtest: the child has all signals blocked.
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i]--
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return err
	}
	pid, errno := s.fork()
	err := unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	if errno != 0 {
		return errno
	}
	var status unix.WaitStatus
	if _, waitErr := unix.Wait4(int(pid), &status, 0, nil); waitErr != nil {
		return waitErr
	}
	if status != 0 {
		return fmt.Errorf("%s: a forked process: status %#x: bit n of the code stands for piece n, 0x80 for its child", name, status)
	}
	return err
}

//go:norace
//go:nosplit
func (s *script) fork() (uintptr, syscall.Errno) {
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if pid == 0 && errno == 0 {
		s.child()
	}
	return pid, errno
}

//go:norace
//go:nosplit
func (s *script) child() {
	code, child := uintptr(0), uintptr(0)
	for s.nested > 0 && child == 0 { // whoever is new goes on with it
		s.nested--
		var errno syscall.Errno
		if child, _, errno = unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0); errno != 0 {
			code |= 0x80
		}
	}
	for i := 0; i < s.n; i++ {
		if s.pieces[i].wrong(&s.first) != 0 {
			code |= 1 << (i % 7)
		}
	}
	if child != 0 {
		unix.RawSyscall6(unix.SYS_WAIT4, child, uintptr(unsafe.Pointer(&s.status)), 0, 0, 0, 0)
		if s.status != 0 {
			code |= 0x80
		}
	}
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, code, 0, 0)
	}
}

// plain has 64 MiB, and memory of every kind that is not in the images, or is
// there and is not ours to serve.
func plain() error {
	big, err := mapPiece(64<<20/pageSize, 1)
	untouched, err1 := mapPiece(1024, 0)
	read, err2 := mapPiece(64, 0) // the kernel's page of zeros
	holes, err3 := mapPiece(64, 2)
	shared, err4 := mapAt(0, 64, 3, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	locked, err5 := mapAt(0, 16, 4, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_LOCKED)
	if err := errors.Join(err, err1, err2, err3, err4, err5, check("zeros", read)); err != nil {
		return err
	}
	// Every other page is given back.
	for i := uint64(0); i < 64; i += 2 {
		if err := unix.Madvise(unsafe.Slice((*byte)(at(holes.addr+pageCount(i))), pageSize), unix.MADV_DONTNEED); err != nil {
			return err
		}
	}
	checkHoles := func() error {
		var errs []error
		for i := range uint64(64) {
			page := holes.zeros(i, 1)
			if i%2 == 0 {
				errs = append(errs, check("given back", page))
			} else if *(*uint64)(at(page.addr)) != word(2, pageCount(i)) {
				errs = append(errs, fmt.Errorf("kept page %d is wrong", i))
			}
		}
		return errors.Join(errs...)
	}
	// A file, one page of which was written.
	const filePages = 8
	file, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	mapped, err := unix.Mmap(int(exe.Fd()), 0, filePages*int(pageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	exe.Close()
	if err != nil {
		return err
	}
	want := bytes.Clone(file[:len(mapped)])
	file = nil
	for _, b := range [][]byte{mapped, want} {
		b[3*pageSize+5] ^= 0xff
	}
	if err := say("ready", ""); err != nil {
		return err
	}
	hear("go")
	errs := []error{check("64 MiB", big), check("untouched", untouched), check("read", read), checkHoles(),
		check("shared", shared), check("locked", locked)}
	if !bytes.Equal(mapped, want) {
		errs = append(errs, errors.New("the file is wrong"))
	}
	return verdict(errs...)
}
