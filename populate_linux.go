package uffd

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

func populate(mem []byte, write bool) error {
	advice := unix.MADV_POPULATE_READ
	if write {
		advice = unix.MADV_POPULATE_WRITE
	}
	start, length := wholePages(mem)
	e := madvise(start, length, advice)
	if e == unix.EINVAL && madvise(nil, 0, advice) == unix.EINVAL { // the kernel does not know the advice
		e = populateOld(start, length, write)
	}
	runtime.KeepAlive(mem)
	return result(opPopulate, e)
}

// wholePages returns the pages that mem lies in.
func wholePages(mem []byte) (unsafe.Pointer, uintptr) {
	start := unsafe.Pointer(unsafe.SliceData(mem))
	before := uintptr(start) & uintptr(pageMask)
	length := (before + uintptr(len(mem)) + uintptr(pageMask)) &^ uintptr(pageMask)
	return unsafe.Add(start, -int(before)), length
}

func madvise(start unsafe.Pointer, length uintptr, advice int) unix.Errno {
	for {
		_, _, e := unix.Syscall(unix.SYS_MADVISE, uintptr(start), length, uintptr(advice))
		if e != unix.EINTR {
			return e
		}
	}
}

// populateOld faults pages in one at a time, through system calls that look
// their memory up as madvise does.
func populateOld(start unsafe.Pointer, length uintptr, write bool) unix.Errno {
	for off := uintptr(0); off < length; off += uintptr(os.Getpagesize()) {
		page := unsafe.Add(start, off)
		e := readPage(page)
		if e == 0 && write {
			e = writePage(page)
		}
		if e != 0 {
			return e
		}
	}
	return 0
}

// readPage reads a byte of the page.
func readPage(page unsafe.Pointer) unix.Errno {
	var b byte
	local := unix.Iovec{Base: &b}
	local.SetLen(1)
	remote := unix.Iovec{Base: (*byte)(page)}
	remote.SetLen(1)
	_, _, e := unix.Syscall6(unix.SYS_PROCESS_VM_READV, uintptr(os.Getpid()),
		uintptr(unsafe.Pointer(&local)), 1, uintptr(unsafe.Pointer(&remote)), 1, 0)
	return e
}

// writePage adds 0 to the first word of the page, in one step for other threads.
// The futex has to be a shared one: the kernel then faults the page in before it
// writes.
func writePage(page unsafe.Pointer) unix.Errno {
	const (
		futexWakeOp = 5
		addZero     = 1 << 28 // FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0)
	)
	_, _, e := unix.Syscall6(unix.SYS_FUTEX, uintptr(page), futexWakeOp, 0, 0, uintptr(page), addZero)
	return e
}
