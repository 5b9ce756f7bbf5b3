package uffd

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// supported is whether the system has userfaultfd.
const supported = true

const openFlags = unix.O_CLOEXEC | unix.O_NONBLOCK

func open(faults Faults) (*File, error) {
	failed := new(OpenError)
	attempt := func(way string, open func(flags uintptr) (int, unix.Errno), mode uintptr) *File {
		fd, e := open(openFlags | mode)
		if e != 0 {
			failed.Attempts = append(failed.Attempts, OpenAttempt{way, e})
			return nil
		}
		return newFile(fd, mode == userModeOnly, true)
	}
	if faults != UserFaults {
		if f := attempt(devicePath, openNode, 0); f != nil {
			return f, nil
		}
		if f := attempt("userfaultfd(0)", openSyscall, 0); f != nil {
			return f, nil
		}
	}
	if faults == UserFaults || faults == BestFaults && errors.Is(failed.Unwrap(), os.ErrPermission) {
		if f := attempt("userfaultfd(UFFD_USER_MODE_ONLY)", openSyscall, userModeOnly); f != nil {
			return f, nil
		}
	}
	if faults == UserFaults {
		if f := attempt(devicePath, openNode, userModeOnly); f != nil {
			return f, nil
		}
	}
	failed.Remedy = remedy(failed, faults)
	return nil, failed
}

func openDevice(dev *os.File, faults Faults) (*File, error) {
	var mode uintptr
	if faults == UserFaults {
		mode = userModeOnly
	}
	var fd int
	var e unix.Errno
	conn, err := dev.SyscallConn()
	if err == nil && conn.Control(func(devfd uintptr) { fd, e = openIoctl(devfd, openFlags|mode) }) != nil {
		err = os.ErrClosed
	}
	if err == nil && e != 0 {
		err = e
	}
	if err != nil {
		failed := &OpenError{Attempts: []OpenAttempt{{devicePath, err}}}
		if failed.Remedy = remedy(failed, faults); failed.Remedy == "" {
			failed.Remedy = "the file must be an open " + devicePath + ", which Linux has from 6.1 on"
		}
		return nil, failed
	}
	return newFile(fd, mode == userModeOnly, true), nil
}

func openSyscall(flags uintptr) (int, unix.Errno) {
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	return int(fd), e
}

func openNode(flags uintptr) (int, unix.Errno) {
	var dev int
	for {
		var err error
		dev, err = unix.Open(devicePath, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			break
		}
		if err != unix.EINTR {
			return -1, err.(unix.Errno)
		}
	}
	defer unix.Close(dev)
	return openIoctl(uintptr(dev), flags)
}

// openIoctl is the one call whose argument is a number.
func openIoctl(dev, flags uintptr) (int, unix.Errno) {
	fd, _, e := unix.Syscall(unix.SYS_IOCTL, dev, uintptr(reqNew), flags)
	return int(fd), e
}

// remedy says what would open one of the ways that were tried.
func remedy(failed *OpenError, faults Faults) string {
	switch e := failed.Unwrap(); e {
	case unix.ENOSYS:
		return "the kernel lacks CONFIG_USERFAULTFD, or a seccomp filter forbids the system call"
	case unix.EINVAL:
		return "user faults alone need Linux 5.11; on this kernel open with AllFaults"
	case unix.EMFILE, unix.ENFILE:
		return "close descriptors or raise the limit"
	case unix.EPERM, unix.EACCES:
		if faults == AllFaults {
			return "run with CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1, or give access to " + devicePath +
				" (Linux 6.1), or make do with UserFaults; a seccomp filter or security module can forbid it too"
		}
		return "a seccomp filter or security module forbids it; user faults alone need no privilege from Linux 5.11 on," +
			" else run with CAP_SYS_PTRACE or set vm.unprivileged_userfaultfd=1"
	}
	return ""
}

func fromFD(fd int) (*File, error) {
	enabled, err := enabledFeatures(fd)
	if err != nil {
		return nil, err
	}
	if !enabled.Has(initialized) { // Linux before 5.11 does not tell
		if err := checkAPI(fd); err != nil {
			return nil, err
		}
	}
	f := newFile(fd, false, false)
	if err := f.adopt(opFromFD, enabled&^initialized); err != nil {
		return nil, err
	}
	return f, nil
}

// checkAPI finds out from poll whether fd has been through API.
func checkAPI(fd int) error {
	if e := setNonblock(fd); e != 0 {
		return errnoError(opFromFD, e)
	}
	ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := ignoreEINTR(func() (int, error) { return unix.Poll(ready, 0) }); err != nil {
		return &Error{Op: opNames[opFromFD], Err: err}
	}
	if ready[0].Revents&unix.POLLERR != 0 {
		return refusalNoAPI.error(opFromFD)
	}
	return nil
}

// adopt makes a descriptor that has been through API like one of our own. If
// that fails, the descriptor is open and the caller's.
func (f *File) adopt(op op, enabled Features) error {
	if e := setNonblock(f.fd); e != 0 {
		return errnoError(op, e)
	}
	if _, err := unix.FcntlInt(uintptr(f.fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return &Error{Op: opNames[op], Err: err}
	}
	return f.join(op, enabled)
}

func setNonblock(fd int) unix.Errno {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err == nil && flags&unix.O_NONBLOCK == 0 {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_NONBLOCK)
	}
	if err != nil {
		return err.(unix.Errno)
	}
	return 0
}

func ignoreEINTR[T any](call func() (T, error)) (T, error) {
	for {
		v, err := call()
		if err != unix.EINTR {
			return v, err
		}
	}
}

var errNotUserfaultfd error = &Error{Op: opNames[opFromFD], Err: &reason{text: "not a userfaultfd", err: unix.EBADF}}

// initialized is the kernel's own mark in the features of fdinfo.
const initialized Features = 1 << 31

// enabledFeatures reads what is enabled on a userfaultfd, and the mark:
//
//	API:	aa:<enabled>:<offered>
func enabledFeatures(fd int) (Features, error) {
	info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if errors.Is(err, os.ErrNotExist) {
		if _, e := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); e != nil {
			return 0, errNotUserfaultfd
		}
		err = fmt.Errorf("/proc must be mounted to learn what is enabled: %w", err)
	}
	if err != nil {
		return 0, &Error{Op: opNames[opFromFD], Err: err}
	}
	for line := range strings.Lines(string(info)) {
		api, ok := strings.CutPrefix(line, "API:\taa:")
		hex, _, _ := strings.Cut(api, ":")
		if enabled, err := strconv.ParseUint(hex, 16, 64); ok && err == nil {
			return Features(enabled), nil
		}
	}
	return 0, errNotUserfaultfd
}

// polled keeps the os.File of every File that is not closed: one that the
// collector finds is closed, and memory would read as zeros.
var polled struct {
	sync.Mutex
	files map[*os.File]struct{}
}

func keepOpen(f *os.File) {
	polled.Lock()
	defer polled.Unlock()
	if polled.files == nil {
		polled.files = make(map[*os.File]struct{})
	}
	polled.files[f] = struct{}{}
}

// startPolling hands the descriptor to Go's poller. Before API it would be
// reported as broken.
func (f *File) startPolling(op op) (*poller, error) {
	const attempts = 10 // a peer may clear O_NONBLOCK at the wrong time
	var err error
	for range attempts {
		setNonblock(f.fd)
		file := os.NewFile(uintptr(f.fd), "userfaultfd")
		keepOpen(file) // also if it is of no use: its finalizer would close the descriptor
		if err = file.SetReadDeadline(time.Time{}); err != nil {
			continue
		}
		conn, err := file.SyscallConn()
		if err != nil {
			return nil, &Error{Op: opNames[op], Err: err}
		}
		return &poller{file, conn}, nil
	}
	return nil, &Error{Op: opNames[op], Err: fmt.Errorf("the poller of Go does not take the descriptor: %w", err)}
}

func (f *File) close() error {
	var err error
	if p := f.poller.Load(); p == nil {
		err = unix.Close(f.fd)
	} else {
		err = p.file.Close()
		polled.Lock()
		delete(polled.files, p.file)
		polled.Unlock()
	}
	if err != nil {
		return &Error{Op: opNames[opClose], Err: err}
	}
	return nil
}

// rawConn is the descriptor for others, as long as the File is open.
type rawConn struct{ f *File }

func (c rawConn) Control(use func(fd uintptr)) error {
	if err := c.f.begin(opSyscallConn); err != nil {
		return err
	}
	defer c.f.end()
	use(uintptr(c.f.fd))
	return nil
}

func (c rawConn) Read(try func(fd uintptr) bool) error {
	return c.f.wait(opSyscallConn, try)
}

func (c rawConn) Write(func(fd uintptr) bool) error {
	return &Error{Op: opNames[opSyscallConn], Err: &reason{text: "a userfaultfd cannot be written", err: syscall.EBADF}}
}
