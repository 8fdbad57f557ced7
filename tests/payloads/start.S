/* Entries of a bare guest, and the page tables it runs on: the first 4 GiB, mapped one to one.
 * The tables are data, since a guest on a software KVM pays for each instruction that would build them. All pages are
 * the user's too, for payloads that leave privilege level 0 (level3.S). */
#include "long-mode.inc"

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18          /* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long entry32

.section .text.start, "ax", @progbits
.code64
.globl entry64
entry64:
    cli
    mov $stack_top, %esp
    mov $pml4, %eax
    mov %rax, %cr3
    xor %edi, %edi          /* not PVH */
    call payload_start
1:  hlt
    jmp 1b

.code32
entry32:
    cli
    mov $stack_top, %esp
    mov %ebx, %esi          /* hvm_start_info */
    enter_long_mode
    lgdt gdt_pointer
    ljmp $8, $long_mode
.code64
long_mode:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %esi, %esi
    mov $1, %edi            /* PVH */
    call payload_start
1:  hlt
    jmp 1b

.section .data, "aw", @progbits
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt
    .balign 4096
.globl pml4
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad page_directories + 0x0007
    .quad page_directories + 0x1007
    .quad page_directories + 0x2007
    .quad page_directories + 0x3007
    .fill 508, 8, 0
page_directories:
    .set page, 0
    .rept 2048
    .quad (page << 21) + 0x87
    .set page, page + 1
    .endr

.section .bss, "aw", @nobits
    .balign 4096
    .fill 32768
stack_top:
.section .note.GNU-stack, "", @progbits
