package handoff

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"

	"github.com/go-uffd/uffd"
)

// A CloudHypervisor is the memory of a Cloud Hypervisor that has handed it over to
// its manager.
//
// It is experimental: it follows version 0 of a format that has been proposed to
// Cloud Hypervisor (pull request 8657), is in none of its releases, and may
// change with it.
type CloudHypervisor struct {
	// File is the userfaultfd. It is the caller's to close.
	File *uffd.File
	// Regions is the memory, also what was added later.
	Regions []CloudHypervisorRegion
	// Mode is what the memory is registered for, such as "MISSING" or "WP".
	Mode string
	// Pid is the process that Cloud Hypervisor says it is. [PeerPid] says which
	// one connected.
	Pid int

	conn       *net.UnixConn
	memorySize int64
}

// CloudHypervisorRegion is memory of a Cloud Hypervisor's guest.
type CloudHypervisorRegion struct {
	Region
	GuestAddr uint64 // physical address in the guest
}

// ReceiveCloudHypervisor receives the memory of a Cloud Hypervisor that has
// connected. memorySize is the size of the file that backs the memory,
// [math.MaxInt64] if that is not known. [CloudHypervisor.Acknowledge] has to
// follow within two seconds. The connection stays the caller's, and is to be left
// to the CloudHypervisor until it is closed.
//
// Errors are those of [ReceiveFirecracker].
func ReceiveCloudHypervisor(ctx context.Context, conn *net.UnixConn, memorySize int64) (*CloudHypervisor, error) {
	c := &CloudHypervisor{conn: conn, memorySize: memorySize}
	f, err := receive(ctx, conn, true, c.decodeHandoff)
	if err != nil {
		return nil, err
	}
	c.File = f
	return c, nil
}

// Acknowledge tells Cloud Hypervisor that its memory is being served. It goes on
// then.
func (c *CloudHypervisor) Acknowledge(ctx context.Context) error {
	if err := write(ctx, c.conn, []byte{1}); err != nil {
		return fmt.Errorf("handoff: sending: %w", err)
	}
	return nil
}

// ReceiveRegion waits until Cloud Hypervisor adds memory, appends it to Regions and
// returns it. It returns [io.EOF] when Cloud Hypervisor hangs up. Others than
// ReceiveRegion must not use Regions meanwhile.
func (c *CloudHypervisor) ReceiveRegion(ctx context.Context) (CloudHypervisorRegion, error) {
	var added CloudHypervisorRegion
	var over bool
	_, err := receive(ctx, c.conn, false, func(r io.Reader) (err error) {
		added, over, err = c.decodeAddRegion(r)
		return err
	})
	if over {
		return added, io.EOF
	}
	if err != nil {
		return CloudHypervisorRegion{}, err
	}
	c.Regions = append(c.Regions, added)
	return added, nil
}

// cloudHypervisorMessage is any message of Cloud Hypervisor's.
type cloudHypervisorMessage struct {
	Type    string                     `json:"type"`
	Version *int                       `json:"version"`
	Pid     int                        `json:"vmm_pid"`
	Mode    string                     `json:"mode"`
	Regions []cloudHypervisorRawRegion `json:"regions"` // of "handoff"
	Region  *cloudHypervisorRawRegion  `json:"region"`  // of "add_region"
}

type cloudHypervisorRawRegion struct {
	GuestAddr *uint64 `json:"guest_phys_addr"`
	HostAddr  *uint64 `json:"host_virt_addr"`
	Size      *uint64 `json:"size"`
	Offset    *uint64 `json:"backing_file_offset"`
}

// decode reads a message with its length in front. It returns io.EOF if there is
// none.
func (m *cloudHypervisorMessage) decode(r io.Reader) error {
	var header [4]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(header[:])
	if n == 0 || n > maxMessage {
		return fmt.Errorf("a length of %d bytes", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return json.Unmarshal(body, m)
}

func (c *CloudHypervisor) decodeHandoff(r io.Reader) error {
	var m cloudHypervisorMessage
	if err := m.decode(r); err != nil {
		return err
	}
	switch {
	case m.Type != "handoff":
		return fmt.Errorf("its type is %q instead of handoff", m.Type)
	case m.Version == nil || *m.Version != 0:
		return errors.New("its version is not 0")
	}
	var regions []CloudHypervisorRegion
	for i, raw := range m.Regions {
		region, err := raw.region()
		if err != nil {
			return fmt.Errorf("region %d: %w", i, err)
		}
		regions = append(regions, region)
	}
	c.Regions, c.Mode, c.Pid = regions, m.Mode, m.Pid
	return checkRegions(c.regions(), c.memorySize)
}

func (c *CloudHypervisor) decodeAddRegion(r io.Reader) (_ CloudHypervisorRegion, over bool, err error) {
	var none CloudHypervisorRegion
	var m cloudHypervisorMessage
	if err := m.decode(r); err != nil {
		return none, err == io.EOF, err
	}
	if m.Type != "add_region" || m.Region == nil {
		return none, false, fmt.Errorf("its type is %q instead of add_region, or it has no region", m.Type)
	}
	added, err := m.Region.region()
	if err != nil {
		return none, false, err
	}
	return added, false, checkRegions(append(c.regions(), added.Region), c.memorySize)
}

// regions is Regions without what only Cloud Hypervisor has.
func (c *CloudHypervisor) regions() []Region {
	var regions []Region
	for _, r := range c.Regions {
		regions = append(regions, r.Region)
	}
	return slices.Clip(regions)
}

func (raw *cloudHypervisorRawRegion) region() (CloudHypervisorRegion, error) {
	if raw.GuestAddr == nil || raw.HostAddr == nil || raw.Size == nil || raw.Offset == nil {
		return CloudHypervisorRegion{}, errors.New("guest_phys_addr, host_virt_addr, size or backing_file_offset is missing")
	}
	if *raw.Offset > math.MaxInt64 {
		return CloudHypervisorRegion{}, fmt.Errorf("its offset is %d", *raw.Offset)
	}
	return CloudHypervisorRegion{
		Region: Region{
			Range:  uffd.Range{Start: uffd.Addr(*raw.HostAddr), Len: *raw.Size},
			Offset: int64(*raw.Offset),
		},
		GuestAddr: *raw.GuestAddr,
	}, nil
}
