package uffd

import (
	"math/bits"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Request numbers, computed as the macros of <linux/ioctl.h> do.
const (
	iocType = 0xaa // UFFDIO

	iocTypeShift = 8
	iocSizeShift = 16
	iocDirShift  = iocSizeShift + iocSizeBits

	kindIO   = iocNone<<iocDirShift | iocType<<iocTypeShift
	kindIOR  = iocRead<<iocDirShift | iocType<<iocTypeShift
	kindIOW  = iocWrite<<iocDirShift | iocType<<iocTypeShift
	kindIOWR = (iocRead|iocWrite)<<iocDirShift | iocType<<iocTypeShift

	// UNREGISTER and WAKE are _IOR though the kernel reads their argument: a
	// mistake that stayed.
	reqAPI          = kindIOWR + uint32(unsafe.Sizeof(uffdioAPI{}))<<iocSizeShift + 0x3f
	reqRegister     = kindIOWR + uint32(unsafe.Sizeof(uffdioRegister{}))<<iocSizeShift + 0x00
	reqUnregister   = kindIOR + uint32(unsafe.Sizeof(uffdioRange{}))<<iocSizeShift + 0x01
	reqWake         = kindIOR + uint32(unsafe.Sizeof(uffdioRange{}))<<iocSizeShift + 0x02
	reqCopy         = kindIOWR + uint32(unsafe.Sizeof(uffdioCopy{}))<<iocSizeShift + 0x03
	reqZeroPage     = kindIOWR + uint32(unsafe.Sizeof(uffdioZeropage{}))<<iocSizeShift + 0x04
	reqMove         = kindIOWR + uint32(unsafe.Sizeof(uffdioMove{}))<<iocSizeShift + 0x05
	reqWriteProtect = kindIOWR + uint32(unsafe.Sizeof(uffdioWriteprotect{}))<<iocSizeShift + 0x06
	reqContinue     = kindIOWR + uint32(unsafe.Sizeof(uffdioContinue{}))<<iocSizeShift + 0x07
	reqPoison       = kindIOWR + uint32(unsafe.Sizeof(uffdioPoison{}))<<iocSizeShift + 0x08
	reqRWProtect    = kindIOWR + uint32(unsafe.Sizeof(uffdioRWProtect{}))<<iocSizeShift + 0x09
	reqSetMode      = kindIOW + uint32(unsafe.Sizeof(uffdioSetMode{}))<<iocSizeShift + 0x0a

	reqNew = kindIO + 0x00 // USERFAULTFD_IOC_NEW, on /dev/userfaultfd
)

// requests has the request number of each ioctl.
var requests = map[Ioctls]uint32{
	IoctlAPI:          reqAPI,
	IoctlRegister:     reqRegister,
	IoctlUnregister:   reqUnregister,
	IoctlWake:         reqWake,
	IoctlCopy:         reqCopy,
	IoctlZeroPage:     reqZeroPage,
	IoctlMove:         reqMove,
	IoctlWriteProtect: reqWriteProtect,
	IoctlContinue:     reqContinue,
	IoctlPoison:       reqPoison,
	IoctlRWProtect:    reqRWProtect,
	IoctlSetMode:      reqSetMode,
}

// Request returns the request number of a single ioctl on this architecture, as
// seccomp filters want it; false for no, several or unknown bits.
func (s Ioctls) Request() (uint32, bool) {
	if bits.OnesCount64(uint64(s)) != 1 {
		return 0, false
	}
	request, ok := requests[s]
	return request, ok
}

// ioctl makes a call that may take its time.
func ioctl(fd int, request uint32, arg unsafe.Pointer) unix.Errno {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg))
	return e
}

// ioctlShort makes a call that is over soon: without telling the scheduler,
// which costs as much as the kernel takes to install a page.
func ioctlShort(fd int, request uint32, arg unsafe.Pointer) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg))
	return e
}

// shortBytes is how much a short call may work on.
const shortBytes = 64 << 10

func ioctlRange(fd int, request uint32, arg unsafe.Pointer, length uint64) unix.Errno {
	if length <= shortBytes {
		return ioctlShort(fd, request, arg)
	}
	return ioctl(fd, request, arg)
}

// done says what came of a call that installs pages. The kernel sets out on
// success and with EAGAIN, to the bytes done or to -EAGAIN; older kernels leave
// it at our 0 when they did nothing.
func done(op op, e unix.Errno, out int64) (int64, error) {
	switch e {
	case 0:
		return out, nil
	case unix.EAGAIN:
		return max(out, 0), errnoError(op, e)
	}
	return 0, errnoError(op, e)
}

func result(op op, e unix.Errno) error {
	if e != 0 {
		return errnoError(op, e)
	}
	return nil
}

func (f *File) api(want Features) (Features, Ioctls, error) {
	arg := uffdioAPI{api: uffdAPI, features: uint64(want)}
	e := ioctl(f.fd, reqAPI, unsafe.Pointer(&arg))
	if e == 0 {
		return Features(arg.features), Ioctls(arg.ioctls), nil
	}
	if e == unix.EINVAL && want != 0 {
		if offered, err := Probe(); err == nil && want&^offered != 0 {
			return 0, 0, &FeatureError{Missing: want &^ offered, Offered: offered}
		}
	}
	return 0, 0, errnoError(opAPI, e)
}

func (f *File) register(r Range, mode RegisterMode) (Ioctls, error) {
	arg := uffdioRegister{rng: r.abi(), mode: uint64(mode)}
	e := ioctl(f.fd, reqRegister, unsafe.Pointer(&arg))
	if e != 0 {
		return 0, errnoError(opRegister, e)
	}
	return Ioctls(arg.ioctls), nil
}

func (f *File) unregister(r Range) error {
	arg := r.abi()
	err := result(opUnregister, ioctl(f.fd, reqUnregister, unsafe.Pointer(&arg)))
	// The kernel wakes before it locks the mappings: a fault that comes in
	// between would sleep for ever (seen on 6.18), as do all but those for
	// missing pages. On an error part of r can be unregistered.
	f.wake(r)
	return err
}

func (f *File) wake(r Range) error {
	arg := r.abi()
	return result(opWake, ioctlShort(f.fd, reqWake, unsafe.Pointer(&arg)))
}

func (f *File) copyPages(dst Addr, src []byte, mode CopyMode) (int64, error) {
	arg := uffdioCopy{
		dst:  uint64(dst),
		src:  unsafe.Pointer(unsafe.SliceData(src)),
		len:  uint64(len(src)),
		mode: uint64(mode),
	}
	e := ioctlRange(f.fd, reqCopy, unsafe.Pointer(&arg), arg.len)
	return done(opCopy, e, arg.copied)
}

func (f *File) zeroPage(r Range, mode ZeroPageMode) (int64, error) {
	arg := uffdioZeropage{rng: r.abi(), mode: uint64(mode)}
	e := ioctlRange(f.fd, reqZeroPage, unsafe.Pointer(&arg), r.Len)
	return done(opZeroPage, e, arg.zeroed)
}

func (f *File) mapPages(r Range, mode ContinueMode) (int64, error) {
	arg := uffdioContinue{rng: r.abi(), mode: uint64(mode)}
	e := ioctlRange(f.fd, reqContinue, unsafe.Pointer(&arg), r.Len)
	return done(opContinue, e, arg.mapped)
}

func (f *File) poison(r Range, mode PoisonMode) (int64, error) {
	arg := uffdioPoison{rng: r.abi(), mode: uint64(mode)}
	e := ioctlRange(f.fd, reqPoison, unsafe.Pointer(&arg), r.Len)
	return done(opPoison, e, arg.updated)
}

func (f *File) move(dst Addr, src Range, mode MoveMode) (int64, error) {
	arg := uffdioMove{dst: uint64(dst), src: uint64(src.Start), len: src.Len, mode: uint64(mode)}
	e := ioctlRange(f.fd, reqMove, unsafe.Pointer(&arg), src.Len)
	return done(opMove, e, arg.moved)
}

func (f *File) writeProtect(r Range, mode WriteProtectMode) error {
	arg := uffdioWriteprotect{rng: r.abi(), mode: uint64(mode)}
	return result(opWriteProtect, ioctlRange(f.fd, reqWriteProtect, unsafe.Pointer(&arg), r.Len))
}

func (f *File) rwProtect(r Range, mode RWProtectMode) error {
	arg := uffdioRWProtect{rng: r.abi(), mode: uint64(mode)}
	return result(opRWProtect, ioctlRange(f.fd, reqRWProtect, unsafe.Pointer(&arg), r.Len))
}

func (f *File) setMode(enable, disable Features) error {
	arg := uffdioSetMode{enable: uint64(enable), disable: uint64(disable)}
	if e := ioctl(f.fd, reqSetMode, unsafe.Pointer(&arg)); e != 0 {
		return errnoError(opSetMode, e)
	}
	for {
		old := f.features.Load()
		if f.features.CompareAndSwap(old, old&^uint64(disable)|uint64(enable)) {
			return nil
		}
	}
}

func (r Range) abi() uffdioRange { return uffdioRange{uint64(r.Start), r.Len} }
