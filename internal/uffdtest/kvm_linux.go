package uffdtest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	kvmCreateVM   = 0xae01
	kvmCreateVCPU = 0xae41
)

// RequireKVM skips t where /dev/kvm cannot make a virtual machine.
func RequireKVM(t testing.TB) {
	t.Helper()
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		skip(t, "virtual machines: %v", err)
	}
	defer kvm.Close()
	vm, _, errno := unix.Syscall(unix.SYS_IOCTL, kvm.Fd(), kvmCreateVM, 0)
	if errno != 0 {
		skip(t, "virtual machines: KVM_CREATE_VM: %v", errno)
	}
	defer unix.Close(int(vm))
	vcpu, _, errno := unix.Syscall(unix.SYS_IOCTL, vm, kvmCreateVCPU, 0)
	if errno != 0 {
		skip(t, "virtual machines: KVM_CREATE_VCPU: %v", errno)
	}
	unix.Close(int(vcpu))
}
