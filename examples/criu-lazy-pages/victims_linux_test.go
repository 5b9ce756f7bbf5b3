package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// changing forks, moves, grows, discards, and unmaps memory after it was restored.
func changing() error {
	const pages = 2048
	var m [8]piece
	for i := range m {
		var err error
		if m[i], err = mapPiece(pages, uint64(i+1)); err != nil {
			return err
		}
	}
	if err := say("ready", ""); err != nil {
		return err
	}
	hear("go")
	var errs []error
	do := func(err error) { errs = append(errs, err) }

	// The children touch it first.
	do(forked("children", 3, m[0], m[1]))
	do(check("after the fork", m[0]))

	// Discarded before it was ever touched, but for one page.
	do(check("one page", piece{m[2].addr, pageSize, 3}))
	do(madvise(m[2].addr, m[2].len, unix.MADV_DONTNEED))
	m[2].seed = 0
	do(forked("discarded", 1, m[2]))
	do(check("discarded", m[2]))

	// Moved, and grown by as much.
	addr, err := mremap(m[3].addr, m[3].len, 2*m[3].len, unix.MREMAP_MAYMOVE, 0)
	do(err)
	m[3].addr = addr
	grown := piece{addr + m[3].len, m[3].len, 0}
	do(forked("grown", 2, m[3], grown))
	do(check("grown", m[3], grown))

	// The middle unmapped, and mapped again.
	hole := m[4].zeros(pages/4, pages/2)
	do(munmap(hole.addr, hole.len))
	_, err = mapAt(hole.addr, pages/2, 0, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
	do(err)
	head := piece{m[4].addr, m[4].len / 4, 5}
	do(check("mapped again", head, hole))
	if got := *(*uint64)(at(m[4].addr + m[4].len - 8)); got != word(5, m[4].len-8) {
		do(fmt.Errorf("behind what was mapped again: %#x", got))
	}

	// Moved to an address that had something else that was not touched.
	_, err = mremap(m[5].addr, m[5].len, m[5].len, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, m[6].addr)
	do(err)
	m[6].seed = 6
	do(check("moved over", m[6]))

	// The contents moved away, the mapping stays.
	addr, err = mremap(m[7].addr, m[7].len, m[7].len, unix.MREMAP_MAYMOVE|unix.MREMAP_DONTUNMAP, 0)
	do(err)
	left := m[7]
	left.seed = 0
	m[7].addr = addr
	do(check("left", left))
	do(check("moved", m[7]))

	do(forked("at last", 2, m[0], m[1], m[2], m[3], grown, m[6], m[7]))
	return verdict(errs...)
}

func madvise(addr, length uint64, advice int) error {
	return os.NewSyscallError("madvise", unix.Madvise(unsafe.Slice((*byte)(at(addr)), length), advice))
}

func munmap(addr, length uint64) error {
	return os.NewSyscallError("munmap", unix.MunmapPtr(at(addr), uintptr(length)))
}

func mremap(addr, oldLen, newLen uint64, flags int, to uint64) (uint64, error) {
	p, err := unix.MremapPtr(at(addr), uintptr(oldLen), at(to), uintptr(newLen), flags)
	return uint64(uintptr(p)), os.NewSyscallError("mremap", err)
}

// tree has a child with memory of its own, and one that is a zombie.
func tree() error {
	const code = 7
	child, err := spawn("tree-child", "child")
	if err != nil {
		return err
	}
	zombie, err := spawn("tree-zombie", "zombie")
	if err != nil {
		return err
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, zombie, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		return err
	}
	m, err := mapPiece(16<<20/pageSize, 21)
	if err != nil {
		return err
	}
	hear("child-ready")
	if err := say("ready", ""); err != nil {
		return err
	}
	hear("go")
	errs := []error{check("parent", m)}
	for _, want := range []struct{ pid, code int }{{child, 0}, {zombie, code}} {
		var status syscall.WaitStatus
		if _, err := syscall.Wait4(want.pid, &status, 0, nil); err != nil || status.ExitStatus() != want.code {
			errs = append(errs, fmt.Errorf("child %d: %v, exit status %d, want %d", want.pid, err, status.ExitStatus(), want.code))
		}
	}
	return verdict(errs...)
}

// spawn starts this program without a pidfd, which CRIU need not know.
func spawn(role, name string) (pid int, err error) {
	env := []string{"UFFD_TEST_ROLE=" + role}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "UFFD_TEST_ROLE=") {
			env = append(env, v)
		}
	}
	return syscall.ForkExec("/proc/self/exe", []string{name}, &syscall.ProcAttr{Env: env, Files: []uintptr{0, 1, 2}})
}

func treeChild() error {
	m, err := mapPiece(16<<20/pageSize, 22)
	if err != nil {
		return err
	}
	if err := say("child-ready", ""); err != nil {
		return err
	}
	hear("go")
	if err := errors.Join(check("child", m), forked("child", 1, m)); err != nil {
		return err
	}
	return nil
}

func treeZombie() error {
	os.Exit(7)
	return nil
}
