//go:build !ppc64 && !ppc64le && !mips && !mipsle && !mips64 && !mips64le

package uffd

// The _IOC encoding of <asm-generic/ioctl.h>: 2 bits of direction, 14 of size.
const (
	iocNone  = 0
	iocWrite = 1
	iocRead  = 2

	iocSizeBits = 14
)
