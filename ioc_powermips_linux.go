//go:build ppc64 || ppc64le || mips || mipsle || mips64 || mips64le

package uffd

// The _IOC encoding of PowerPC and MIPS: 3 bits of direction, 13 of size.
const (
	iocNone  = 1
	iocRead  = 2
	iocWrite = 4

	iocSizeBits = 13
)
