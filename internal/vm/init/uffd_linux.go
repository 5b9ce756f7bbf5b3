package main

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// uffdFeatures asks the kernel what UFFDIO_API offers. It does so without the
// library, whose tests are judged by the answer.
func uffdFeatures() (uint64, error) {
	const uffdioAPI = 0xc018aa3f // the same number on every architecture
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return 0, fmt.Errorf("userfaultfd: %w", errno)
	}
	defer unix.Close(int(fd))
	arg := struct{ api, features, ioctls uint64 }{api: 0xaa}
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, uffdioAPI, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return 0, fmt.Errorf("UFFDIO_API: %w", errno)
	}
	return arg.features, nil
}
