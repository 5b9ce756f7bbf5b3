package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/internal/uffdtest"
)

// A real guest: a virtual machine of /dev/kvm, in the process that acts as
// Firecracker. Its program and all its data are in the snapshot, so whatever it
// fetches, reads or writes faults within KVM_RUN.

// The programs of the guest, in 32-bit protected mode. They work on the memory
// from ESI on, up to EDI, and halt.
const (
	programs = 0x1000 // where they are in its memory

	sumUp   = programs        // EAX: what checksum returns
	sumDown = programs + 0x20 // the same from EDI on, down to ESI
	fill    = programs + 0x40 // writes EAX at the start of each 4 KiB

	stride = 64 // of the words that are summed up: some KVMs emulate each instruction
)

var code = map[int][]byte{
	sumUp: {
		0xd1, 0xc0, // rol eax, 1
		0x03, 0x06, // add eax, [esi]
		0x83, 0xc6, stride, // add esi, stride
		0x39, 0xfe, // cmp esi, edi
		0x75, 0xf5, // jne sumUp
		0xf4, // hlt
	},
	sumDown: {
		0x83, 0xef, stride, // sub edi, stride
		0xd1, 0xc0, // rol eax, 1
		0x03, 0x07, // add eax, [edi]
		0x39, 0xfe, // cmp esi, edi
		0x75, 0xf5, // jne sumDown
		0xf4, // hlt
	},
	fill: {
		0x89, 0x06, // mov [esi], eax
		0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add esi, 4096
		0x39, 0xfe, // cmp esi, edi
		0x75, 0xf4, // jne fill
		0xf4, // hlt
	},
}

// checksum is what sumUp, or sumDown, makes of memory.
func checksum(mem []byte, down bool) (sum uint32) {
	for i := 0; i < len(mem); i += stride {
		at := i
		if down {
			at = len(mem) - stride - i
		}
		sum = bits.RotateLeft32(sum, 1) + binary.LittleEndian.Uint32(mem[at:])
	}
	return sum
}

// highGuest is where the higher region is in the guest's physical memory, behind
// a gap.
const highGuest = 1 << 30

// KVM's requests, and structures of <linux/kvm.h>.
const (
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVM            = 0xae01
	kvmCreateVCPU          = 0xae41
	kvmSetTSSAddr          = 0xae47
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmGetRegs             = 0x8090ae81
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmExitHalt = 5
)

type kvmMemoryRegion struct {
	slot, flags           uint32
	guest, size, userAddr uint64
}

type kvmRegs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
	r8to15                                 [8]uint64
	rip, rflags                            uint64
}

type kvmSegment struct {
	base                                           uint64
	limit                                          uint32
	selector                                       uint16
	kind, present, dpl, db, s, l, g, avl, unusable uint8
	_                                              uint8
}

type kvmSregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt kvmSegment
	gdt, idt                        [2]uint64
	cr0, cr2, cr3, cr4, cr8         uint64
	efer, apicBase                  uint64
	interrupts                      [4]uint64
}

func ioctl(fd, request, arg uintptr) (uintptr, error) {
	for {
		v, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, arg)
		switch errno {
		case 0:
			return v, nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("request %#x of KVM: %w", request, errno)
		}
	}
}

// microVM has the vCPUs of this process.
var microVM []vcpu

type vcpu struct {
	fd  uintptr
	run []byte // struct kvm_run
}

var _ = uffdtest.Handle("make microVM", func(a []uint64) ([]uint64, error) {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	vm, err := ioctl(uintptr(kvm), kvmCreateVM, 0)
	if err != nil {
		return nil, err
	}
	if _, err := ioctl(vm, kvmSetTSSAddr, 0xfffbd000); err != nil {
		return nil, err
	}
	for slot, r := range []kvmMemoryRegion{
		{guest: 0, userAddr: a[0], size: a[1]},
		{guest: highGuest, userAddr: a[2], size: a[3]},
	} {
		r.slot = uint32(slot)
		if _, err := ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&r))); err != nil {
			return nil, err
		}
	}
	size, err := ioctl(uintptr(kvm), kvmGetVCPUMmapSize, 0)
	if err != nil {
		return nil, err
	}
	for id := range uintptr(a[4]) {
		fd, err := ioctl(vm, kvmCreateVCPU, id)
		if err != nil {
			return nil, err
		}
		run, err := unix.Mmap(int(fd), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, err
		}
		microVM = append(microVM, vcpu{fd, run})
	}
	return nil, nil
})

// Running a vCPU takes its number, a program, ESI, EDI and EAX, and returns EAX.
var _ = uffdtest.Handle("run vCPU", func(a []uint64) ([]uint64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	v := microVM[a[0]]
	sregs, regs := new(kvmSregs), new(kvmRegs)
	if _, err := ioctl(v.fd, kvmGetSregs, uintptr(unsafe.Pointer(sregs))); err != nil {
		return nil, err
	}
	flat := kvmSegment{limit: 1<<32 - 1, selector: 16, kind: 3, present: 1, db: 1, s: 1, g: 1}
	sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss = flat, flat, flat, flat, flat
	flat.selector, flat.kind = 8, 11
	sregs.cs = flat
	sregs.cr0 |= 1
	if _, err := ioctl(v.fd, kvmSetSregs, uintptr(unsafe.Pointer(sregs))); err != nil {
		return nil, err
	}
	regs.rip, regs.rsi, regs.rdi, regs.rax, regs.rflags = a[1], a[2], a[3], a[4], 2
	if _, err := ioctl(v.fd, kvmSetRegs, uintptr(unsafe.Pointer(regs))); err != nil {
		return nil, err
	}
	if _, err := ioctl(v.fd, kvmRun, 0); err != nil {
		return nil, err
	}
	if reason := binary.NativeEndian.Uint32(v.run[8:]); reason != kvmExitHalt {
		return nil, fmt.Errorf("vCPU %d does not halt: it exits for reason %d (%d)", a[0], reason, binary.NativeEndian.Uint32(v.run[32:]))
	}
	if _, err := ioctl(v.fd, kvmGetRegs, uintptr(unsafe.Pointer(regs))); err != nil {
		return nil, err
	}
	return []uint64{regs.rax}, nil
})

// Hashing reads memory as the VMM does.
var _ = uffdtest.Handle("hash", func(a []uint64) ([]uint64, error) {
	return []uint64{hash(uffdtest.BytesAt(a[0], a[1]))}, nil
})

func hash(mem []byte) uint64 {
	h := fnv.New64a()
	h.Write(mem)
	return h.Sum64()
}

// A kvmGuest is a guest with a microVM, and what its memory has to hold.
type kvmGuest struct {
	*guest
	t    *testing.T
	want []byte
}

// bootKVM restores a guest from a snapshot of random bytes.
func bootKVM(t *testing.T, kind uffdtest.Kind, pages, vcpus int, r *rand.ChaCha8) (*kvmGuest, *testHandler) {
	t.Helper()
	uffdtest.RequireKVM(t)
	uffdtest.RequireAllFaults(t)
	want := make([]byte, pages*kind.PageSize())
	r.Read(want)
	for at, program := range code {
		copy(want[at:], program)
	}
	mem := filepath.Join(t.TempDir(), "mem")
	if err := os.WriteFile(mem, want, 0o600); err != nil {
		t.Fatal(err)
	}
	h := start(t, mem)
	g := restore(t, kind, pages, version1_12)
	g.Run("make microVM", uint64(g.low.Start), g.low.Len, uint64(g.high.Start), g.high.Len, uint64(vcpus)).Value()
	return &kvmGuest{g, t, want}, h
}

// memory is what a region has to hold.
func (g *kvmGuest) memory(high bool) []byte {
	if high {
		return g.want[g.low.Len:]
	}
	return g.want[:g.low.Len]
}

// sum starts a vCPU that reads a whole region.
func (g *kvmGuest) sum(vcpu int, high, down bool) *uffdtest.Call {
	g.t.Helper()
	program, from := uint64(sumUp), uint64(0)
	if down {
		program = sumDown
	}
	if high {
		from = highGuest
	}
	return g.Run("run vCPU", uint64(vcpu), program, from, from+uint64(len(g.memory(high))), 0)
}

// intact has vCPUs read all pages at the same time, in both directions, and then
// the VMM all bytes.
func (g *kvmGuest) intact() {
	g.t.Helper()
	var sums [4]*uffdtest.Call
	for i := range sums {
		sums[i] = g.sum(i, i/2 == 1, i%2 == 1)
	}
	for i, sum := range sums {
		high, down := i/2 == 1, i%2 == 1
		if got, want := sum.Value(), uint64(checksum(g.memory(high), down)); got != want {
			g.t.Errorf("vCPU %d (high %v, down %v): the sum is %#x, want %#x", i, high, down, got, want)
		}
	}
	for i, m := range []uffdtest.Memory{g.low, g.high} {
		if g.Run("hash", uint64(m.Start), m.Len).Value() != hash(g.memory(i == 1)) {
			g.t.Errorf("the VMM sees other bytes in %v", m.Range)
		}
	}
}

func TestKVM(t *testing.T) {
	for _, test := range []struct {
		kind  uffdtest.Kind
		pages int
	}{{uffdtest.Anon, 1024}, {uffdtest.HugetlbPrivate, 4}} {
		t.Run(test.kind.String(), func(t *testing.T) {
			uffdtest.RequireKVM(t)
			if test.kind.Huge() {
				uffdtest.LockSettings(t).HugePages(test.pages)
			}
			seed := rand.Uint64()
			t.Logf("seed %#x", seed)
			g, h := bootKVM(t, test.kind, test.pages, 4, chacha(seed))
			g.intact()
			eventually(t, "all pages are counted", func() bool { return h.pager.Stats().Copied == uint64(test.pages) })
			s := h.pager.Stats()
			if s.Missing == 0 || s.Poisoned+s.Unknown+s.Zeroed != 0 {
				t.Errorf("%+v", s)
			}

			// The guest writes, and keeps what it has written.
			g.Run("run vCPU", 0, fill, highGuest, highGuest+g.high.Len, 0xfee1dead).Value()
			for mem := g.memory(true); len(mem) > 0; mem = mem[4096:] {
				binary.LittleEndian.PutUint32(mem, 0xfee1dead)
			}
			g.intact()
			if after := h.pager.Stats(); after.Missing != s.Missing {
				t.Errorf("%d faults of a guest that has all its memory", after.Missing-s.Missing)
			}
		})
	}
}

func chacha(seed uint64) *rand.ChaCha8 {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}

// TestKVMBalloon takes memory from a guest whose vCPUs use it, as the balloon
// does.
func TestKVMBalloon(t *testing.T) {
	const pages = 512
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	random := chacha(seed)
	r := rand.New(random)
	g, h := bootKVM(t, uffdtest.Anon, pages, 4, random)
	rounds := 20
	if testing.Short() {
		rounds = 5
	}
	for round := range rounds {
		var readers []*uffdtest.Call
		for i := range 3 { // of memory that changes: any sum is right
			readers = append(readers, g.sum(i, true, i%2 == 1))
		}
		written := uint64(r.IntN(g.high.Pages() / 2))
		g.Run("run vCPU", 3, fill, highGuest+written*4096, highGuest+(written+8)*4096, uint64(round)).Value()
		for i := written; i < written+8; i++ {
			binary.LittleEndian.PutUint32(g.memory(true)[i*4096:], uint32(round))
		}
		for range 3 {
			first := r.IntN(g.high.Pages())
			n := 1 + r.IntN(min(20, g.high.Pages()-first))
			inflated := uffd.Range{Start: g.high.Page(first).Start, Len: uint64(n * os.Getpagesize())}
			g.Madvise(inflated, unix.MADV_DONTNEED).Value()
			clear(g.memory(true)[first*os.Getpagesize():][:inflated.Len])
		}
		for _, reader := range readers {
			reader.Value()
		}
		g.intact()
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
	if s := h.pager.Stats(); s.Removes == 0 || s.Poisoned+s.Unknown != 0 {
		t.Errorf("%+v", s)
	}
	if bytes.Equal(g.memory(true), make([]byte, g.high.Len)) {
		t.Error("nothing is left to compare")
	}
}

// TestManyKVMs serves several microVMs, one of which is killed within KVM_RUN.
func TestManyKVMs(t *testing.T) {
	const vms = 3
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	random := chacha(seed)
	first, h := bootKVM(t, uffdtest.Anon, 256, 4, random)
	guests := []*kvmGuest{first}
	for range vms - 1 {
		g := restore(t, uffdtest.Anon, 256, version1_12)
		g.Run("make microVM", uint64(g.low.Start), g.low.Len, uint64(g.high.Start), g.high.Len, 4).Value()
		guests = append(guests, &kvmGuest{g, t, first.want})
	}
	for i := range 4 {
		guests[0].sum(i, true, i%2 == 1)
	}
	guests[0].Kill()
	for _, g := range guests[1:] {
		g.intact()
	}
	eventually(t, "its end is noticed", func() bool { return h.running.Load() == vms-1 && h.exited.Load() == 1 })
}
