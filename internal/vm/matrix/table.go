package main

// A guest is one kernel to test on.
type guest struct {
	kernel    string // version, as vm.FetchKernel takes it
	arch      string // GOARCH of the kernel
	pageSize  int    // in bytes; 0 is the architecture's usual one
	mask      uint64 // what UFFDIO_API offers there
	goarch    string // of the programs, where it is not the kernel's
	hugePages int    // of the default size, to be reserved
	memory    int    // in MiB; 0 is vm.Config's usual amount
	cpu       string // QEMU's name of it, where it is not the machine's usual one
	short     bool   // part of the short tier
	complete  bool   // lacks nothing: no test of the root package may skip
}

const (
	size16K = 16 << 10
	size64K = 64 << 10
)

// guests are the kernels that the library is tested on. The short tier has
// the oldest, the newest and the long-term kernels, pages that are not 4 KiB,
// and a machine that is big-endian.
var guests = []guest{
	{kernel: "5.10", arch: "amd64", mask: 0x1ff, hugePages: 64, short: true},
	{kernel: "6.1", arch: "amd64", mask: 0x1fff, hugePages: 64, short: true},
	{kernel: "6.12", arch: "amd64", mask: 0x1ffff, hugePages: 64, short: true},
	{kernel: "6.16", arch: "amd64", mask: 0x1ffff, hugePages: 64},
	{kernel: "6.17", arch: "amd64", mask: 0x1ffff, hugePages: 64},
	{kernel: "6.18", arch: "amd64", mask: 0x1ffff, hugePages: 64, short: true},
	{kernel: "6.19", arch: "amd64", mask: 0x1ffff, hugePages: 64},
	{kernel: "7.0", arch: "amd64", mask: 0x1ffff, hugePages: 64, short: true},
	{kernel: "7.1", arch: "amd64", mask: 0x1ffff, hugePages: 64},
	{kernel: "7.2", arch: "amd64", mask: 0x1ffff, hugePages: 64},
	{kernel: "7.3", arch: "amd64", mask: 0x7ffff, hugePages: 64, short: true, complete: true},

	{kernel: "6.1", arch: "amd64", mask: 0x1fff, goarch: "386", hugePages: 64},
	{kernel: "7.3", arch: "amd64", mask: 0x7ffff, goarch: "386", hugePages: 64},

	{kernel: "5.10", arch: "386", mask: 0x1ff, hugePages: 32},
	{kernel: "6.1", arch: "386", mask: 0x9fe, hugePages: 32},
	{kernel: "6.5", arch: "386", mask: 0x9fe, hugePages: 32},

	{kernel: "5.10", arch: "arm64", mask: 0x1ff, hugePages: 64},
	{kernel: "6.1", arch: "arm64", mask: 0xffe, hugePages: 64},
	{kernel: "6.12", arch: "arm64", mask: 0x1ffff, hugePages: 64},
	{kernel: "6.18", arch: "arm64", mask: 0x1ffff, hugePages: 64},
	{kernel: "7.3", arch: "arm64", mask: 0x7ffff, hugePages: 64},
	{kernel: "6.12", arch: "arm64", pageSize: size16K, mask: 0x1ffff, hugePages: 16, memory: 2048, short: true},
	{kernel: "7.3", arch: "arm64", pageSize: size16K, mask: 0x7ffff, hugePages: 16, memory: 2048},

	{kernel: "5.10", arch: "arm", mask: 0x1ff, hugePages: 32},
	{kernel: "6.1", arch: "arm", mask: 0x9fe, hugePages: 32},
	{kernel: "6.12", arch: "arm", mask: 0x149fe, hugePages: 32},
	{kernel: "7.3", arch: "arm", mask: 0x149fe}, // unmapping a huge page is a bug of that kernel

	// Here the mask depends on the processor: write protection needs an extension.
	{kernel: "7.2", arch: "riscv64", mask: 0x1ffff, hugePages: 64},
	{kernel: "7.2", arch: "riscv64", mask: 0x14ffe, hugePages: 64, cpu: "rv64"},

	{kernel: "6.1", arch: "ppc64le", mask: 0x9fe, hugePages: 16},
	{kernel: "6.12", arch: "ppc64le", mask: 0x149fe, hugePages: 16},
	{kernel: "7.3", arch: "ppc64le", mask: 0x149fe, hugePages: 16},
	{kernel: "6.12", arch: "ppc64le", pageSize: size64K, mask: 0x149fe, hugePages: 16},
	{kernel: "7.3", arch: "ppc64le", pageSize: size64K, mask: 0x149fe, hugePages: 16},

	{kernel: "6.1", arch: "s390x", mask: 0x9fe},
	{kernel: "6.12", arch: "s390x", mask: 0x149fe, short: true},
	{kernel: "7.3", arch: "s390x", mask: 0x149fe},

	{kernel: "6.1", arch: "mips64le", mask: 0x9fe, hugePages: 16},
	{kernel: "6.12", arch: "mips64le", mask: 0x149fe, hugePages: 16},

	{kernel: "7.2", arch: "loong64", mask: 0x14ffe, hugePages: 4, memory: 2048},
	{kernel: "7.3", arch: "loong64", mask: 0x14ffe, hugePages: 4, memory: 2048},
}

// programArch is the GOARCH of the test binaries for the guest.
func (g *guest) programArch() string {
	if g.goarch != "" {
		return g.goarch
	}
	return g.arch
}
