/*
 * Prints the userfaultfd ABI as the headers it is compiled with have it, one
 * item a line:
 *
 *	sizeof STRUCT BYTES		the size of a structure
 *	offsetof STRUCT.FIELD BYTES	where a field begins
 *	sizeof STRUCT.FIELD BYTES	the size of a field
 *	const NAME VALUE		in hexadecimal
 *	request NAME VALUE		an ioctl's request number, in hexadecimal
 *
 * A field in a nested structure or union is written with all its names, like
 * arg.pagefault.flags. A line that begins with # is a comment.
 *
 * "go run ./internal/abigen" compiles and runs it.
 */
#include <stddef.h>
#include <stdio.h>

#include <linux/fs.h>
#include <linux/userfaultfd.h>
#include <linux/version.h>

#define SIZEOF(s) printf("sizeof %s %zu\n", #s, sizeof(struct s))
#define FIELD(s, f)                                                  \
	printf("offsetof %s.%s %zu\nsizeof %s.%s %zu\n",             \
	       #s, #f, offsetof(struct s, f),                        \
	       #s, #f, sizeof(((struct s *)0)->f))
#define CONST(c) printf("const %s 0x%llx\n", #c, (unsigned long long)(c))
#define REQUEST(r) printf("request %s 0x%08x\n", #r, (unsigned)(r))

static void structures(void)
{
	SIZEOF(uffd_msg);
	FIELD(uffd_msg, event);
	FIELD(uffd_msg, reserved1);
	FIELD(uffd_msg, reserved2);
	FIELD(uffd_msg, reserved3);
	FIELD(uffd_msg, arg);
	FIELD(uffd_msg, arg.pagefault);
	FIELD(uffd_msg, arg.pagefault.flags);
	FIELD(uffd_msg, arg.pagefault.address);
	FIELD(uffd_msg, arg.pagefault.feat);
	FIELD(uffd_msg, arg.pagefault.feat.ptid);
	FIELD(uffd_msg, arg.fork);
	FIELD(uffd_msg, arg.fork.ufd);
	FIELD(uffd_msg, arg.remap);
	FIELD(uffd_msg, arg.remap.from);
	FIELD(uffd_msg, arg.remap.to);
	FIELD(uffd_msg, arg.remap.len);
	FIELD(uffd_msg, arg.remove);
	FIELD(uffd_msg, arg.remove.start);
	FIELD(uffd_msg, arg.remove.end);
	FIELD(uffd_msg, arg.reserved);
	FIELD(uffd_msg, arg.reserved.reserved1);
	FIELD(uffd_msg, arg.reserved.reserved2);
	FIELD(uffd_msg, arg.reserved.reserved3);

	SIZEOF(uffdio_api);
	FIELD(uffdio_api, api);
	FIELD(uffdio_api, features);
	FIELD(uffdio_api, ioctls);

	SIZEOF(uffdio_range);
	FIELD(uffdio_range, start);
	FIELD(uffdio_range, len);

	SIZEOF(uffdio_register);
	FIELD(uffdio_register, range);
	FIELD(uffdio_register, mode);
	FIELD(uffdio_register, ioctls);

	SIZEOF(uffdio_copy);
	FIELD(uffdio_copy, dst);
	FIELD(uffdio_copy, src);
	FIELD(uffdio_copy, len);
	FIELD(uffdio_copy, mode);
	FIELD(uffdio_copy, copy);

	SIZEOF(uffdio_zeropage);
	FIELD(uffdio_zeropage, range);
	FIELD(uffdio_zeropage, mode);
	FIELD(uffdio_zeropage, zeropage);

	SIZEOF(uffdio_writeprotect);
	FIELD(uffdio_writeprotect, range);
	FIELD(uffdio_writeprotect, mode);

	SIZEOF(uffdio_continue);
	FIELD(uffdio_continue, range);
	FIELD(uffdio_continue, mode);
	FIELD(uffdio_continue, mapped);

	SIZEOF(uffdio_poison);
	FIELD(uffdio_poison, range);
	FIELD(uffdio_poison, mode);
	FIELD(uffdio_poison, updated);

	SIZEOF(uffdio_rwprotect);
	FIELD(uffdio_rwprotect, range);
	FIELD(uffdio_rwprotect, mode);

	SIZEOF(uffdio_move);
	FIELD(uffdio_move, dst);
	FIELD(uffdio_move, src);
	FIELD(uffdio_move, len);
	FIELD(uffdio_move, mode);
	FIELD(uffdio_move, move);

	SIZEOF(uffdio_set_mode);
	FIELD(uffdio_set_mode, enable);
	FIELD(uffdio_set_mode, disable);
}

static void constants(void)
{
	CONST(UFFD_USER_MODE_ONLY);
	CONST(UFFD_API);

	CONST(UFFD_FEATURE_PAGEFAULT_FLAG_WP);
	CONST(UFFD_FEATURE_EVENT_FORK);
	CONST(UFFD_FEATURE_EVENT_REMAP);
	CONST(UFFD_FEATURE_EVENT_REMOVE);
	CONST(UFFD_FEATURE_MISSING_HUGETLBFS);
	CONST(UFFD_FEATURE_MISSING_SHMEM);
	CONST(UFFD_FEATURE_EVENT_UNMAP);
	CONST(UFFD_FEATURE_SIGBUS);
	CONST(UFFD_FEATURE_THREAD_ID);
	CONST(UFFD_FEATURE_MINOR_HUGETLBFS);
	CONST(UFFD_FEATURE_MINOR_SHMEM);
	CONST(UFFD_FEATURE_EXACT_ADDRESS);
	CONST(UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
	CONST(UFFD_FEATURE_WP_UNPOPULATED);
	CONST(UFFD_FEATURE_POISON);
	CONST(UFFD_FEATURE_WP_ASYNC);
	CONST(UFFD_FEATURE_MOVE);
	CONST(UFFD_FEATURE_RWP);
	CONST(UFFD_FEATURE_RWP_ASYNC);

	CONST(UFFD_EVENT_PAGEFAULT);
	CONST(UFFD_EVENT_FORK);
	CONST(UFFD_EVENT_REMAP);
	CONST(UFFD_EVENT_REMOVE);
	CONST(UFFD_EVENT_UNMAP);

	CONST(UFFD_PAGEFAULT_FLAG_WRITE);
	CONST(UFFD_PAGEFAULT_FLAG_WP);
	CONST(UFFD_PAGEFAULT_FLAG_MINOR);
	CONST(UFFD_PAGEFAULT_FLAG_RWP);

	CONST(UFFDIO_REGISTER_MODE_MISSING);
	CONST(UFFDIO_REGISTER_MODE_WP);
	CONST(UFFDIO_REGISTER_MODE_MINOR);
	CONST(UFFDIO_REGISTER_MODE_RWP);
	CONST(UFFDIO_COPY_MODE_DONTWAKE);
	CONST(UFFDIO_COPY_MODE_WP);
	CONST(UFFDIO_ZEROPAGE_MODE_DONTWAKE);
	CONST(UFFDIO_WRITEPROTECT_MODE_WP);
	CONST(UFFDIO_WRITEPROTECT_MODE_DONTWAKE);
	CONST(UFFDIO_CONTINUE_MODE_DONTWAKE);
	CONST(UFFDIO_CONTINUE_MODE_WP);
	CONST(UFFDIO_POISON_MODE_DONTWAKE);
	CONST(UFFDIO_MOVE_MODE_DONTWAKE);
	CONST(UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES);
	CONST(UFFDIO_RWPROTECT_MODE_RWP);
	CONST(UFFDIO_RWPROTECT_MODE_DONTWAKE);

	CONST(UFFD_API_REGISTER_MODES);
	CONST(UFFD_API_FEATURES);
	CONST(UFFD_API_IOCTLS);
	CONST(UFFD_API_RANGE_IOCTLS);
	CONST(UFFD_API_RANGE_IOCTLS_BASIC);
}

static void requests(void)
{
	CONST(USERFAULTFD_IOC);
	REQUEST(USERFAULTFD_IOC_NEW);

	CONST(UFFDIO);
	CONST(_UFFDIO_REGISTER);
	CONST(_UFFDIO_UNREGISTER);
	CONST(_UFFDIO_WAKE);
	CONST(_UFFDIO_COPY);
	CONST(_UFFDIO_ZEROPAGE);
	CONST(_UFFDIO_MOVE);
	CONST(_UFFDIO_WRITEPROTECT);
	CONST(_UFFDIO_CONTINUE);
	CONST(_UFFDIO_POISON);
	CONST(_UFFDIO_RWPROTECT);
	CONST(_UFFDIO_SET_MODE);
	CONST(_UFFDIO_API);

	REQUEST(UFFDIO_API);
	REQUEST(UFFDIO_REGISTER);
	REQUEST(UFFDIO_UNREGISTER);
	REQUEST(UFFDIO_WAKE);
	REQUEST(UFFDIO_COPY);
	REQUEST(UFFDIO_ZEROPAGE);
	REQUEST(UFFDIO_MOVE);
	REQUEST(UFFDIO_WRITEPROTECT);
	REQUEST(UFFDIO_CONTINUE);
	REQUEST(UFFDIO_POISON);
	REQUEST(UFFDIO_RWPROTECT);
	REQUEST(UFFDIO_SET_MODE);
}

static void pagemap_scan(void)
{
	SIZEOF(pm_scan_arg);
	FIELD(pm_scan_arg, size);
	FIELD(pm_scan_arg, flags);
	FIELD(pm_scan_arg, start);
	FIELD(pm_scan_arg, end);
	FIELD(pm_scan_arg, walk_end);
	FIELD(pm_scan_arg, vec);
	FIELD(pm_scan_arg, vec_len);
	FIELD(pm_scan_arg, max_pages);
	FIELD(pm_scan_arg, category_inverted);
	FIELD(pm_scan_arg, category_mask);
	FIELD(pm_scan_arg, category_anyof_mask);
	FIELD(pm_scan_arg, return_mask);

	SIZEOF(page_region);
	FIELD(page_region, start);
	FIELD(page_region, end);
	FIELD(page_region, categories);

	CONST(PAGE_IS_WPALLOWED);
	CONST(PAGE_IS_WRITTEN);
	CONST(PAGE_IS_FILE);
	CONST(PAGE_IS_PRESENT);
	CONST(PAGE_IS_SWAPPED);
	CONST(PAGE_IS_PFNZERO);
	CONST(PAGE_IS_HUGE);
	CONST(PAGE_IS_SOFT_DIRTY);
	CONST(PAGE_IS_GUARD);
	CONST(PAGE_IS_ACCESSED);

	CONST(PM_SCAN_WP_MATCHING);
	CONST(PM_SCAN_CHECK_WPASYNC);

	REQUEST(PAGEMAP_SCAN);
}

int main(void)
{
	printf("# The headers are those of Linux %d.%d.%d (LINUX_VERSION_CODE %d).\n",
	       LINUX_VERSION_MAJOR, LINUX_VERSION_PATCHLEVEL,
	       LINUX_VERSION_SUBLEVEL, LINUX_VERSION_CODE);

	printf("\n# <linux/userfaultfd.h>\n");
	structures();
	constants();
	requests();

	printf("\n# <linux/fs.h>: PAGEMAP_SCAN\n");
	pagemap_scan();
	return 0;
}
