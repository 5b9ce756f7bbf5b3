package uffd

import "unsafe"

// The structures of <linux/userfaultfd.h>, Linux 7.3. They consist of 64-bit
// fields in the machine's byte order and are the same on all architectures.
// What the kernel writes comes last and is not read by it.

const (
	uffdAPI      = 0xaa // UFFD_API
	userModeOnly = 1    // UFFD_USER_MODE_ONLY
)

type uffdioAPI struct {
	api      uint64
	features uint64
	ioctls   uint64 // out
}

type uffdioRange struct {
	start uint64
	len   uint64
}

type uffdioRegister struct {
	rng    uffdioRange
	mode   uint64
	ioctls uint64 // out
}

// uffdioCopy holds its source as a pointer, padded to 64 bits: the collector and
// whatever moves stacks have to know it.
type uffdioCopy struct {
	dst    uint64
	_      [pointerPadBefore]byte
	src    unsafe.Pointer
	_      [pointerPadAfter]byte
	len    uint64
	mode   uint64
	copied int64 // out
}

type uffdioZeropage struct {
	rng    uffdioRange
	mode   uint64
	zeroed int64 // out
}

type uffdioContinue struct {
	rng    uffdioRange
	mode   uint64
	mapped int64 // out
}

type uffdioPoison struct {
	rng     uffdioRange
	mode    uint64
	updated int64 // out
}

type uffdioMove struct {
	dst   uint64
	src   uint64
	len   uint64
	mode  uint64
	moved int64 // out
}

type uffdioWriteprotect struct {
	rng  uffdioRange
	mode uint64
}

type uffdioRWProtect struct {
	rng  uffdioRange
	mode uint64
}

type uffdioSetMode struct {
	enable  uint64
	disable uint64
}

// A mirror of another size than the kernel's does not compile.
var (
	_ [msgSize]byte = [unsafe.Sizeof(Msg{})]byte{}
	_ [24]byte      = [unsafe.Sizeof(uffdioAPI{})]byte{}
	_ [16]byte      = [unsafe.Sizeof(uffdioRange{})]byte{}
	_ [16]byte      = [unsafe.Sizeof(Range{})]byte{}
	_ [32]byte      = [unsafe.Sizeof(uffdioRegister{})]byte{}
	_ [40]byte      = [unsafe.Sizeof(uffdioCopy{})]byte{}
	_ [32]byte      = [unsafe.Sizeof(uffdioZeropage{})]byte{}
	_ [32]byte      = [unsafe.Sizeof(uffdioContinue{})]byte{}
	_ [32]byte      = [unsafe.Sizeof(uffdioPoison{})]byte{}
	_ [40]byte      = [unsafe.Sizeof(uffdioMove{})]byte{}
	_ [24]byte      = [unsafe.Sizeof(uffdioWriteprotect{})]byte{}
	_ [24]byte      = [unsafe.Sizeof(uffdioRWProtect{})]byte{}
	_ [16]byte      = [unsafe.Sizeof(uffdioSetMode{})]byte{}
)
