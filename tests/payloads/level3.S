/* Leaves privilege level 0 for good: `run_at_level_3(function)` calls it there and never returns. A software KVM emulates
 * level 0 instruction by instruction, and level 3 runs at the processor's own speed. Every port may be used: by IOPL 3, and
 * by the task state segment's bitmap, which a software KVM looks at even so. */
.code64
.section .text
.globl run_at_level_3
run_at_level_3:
    mov $tss, %eax
    mov %ax, tss_descriptor + 2
    shr $16, %eax
    mov %al, tss_descriptor + 4
    mov %ah, tss_descriptor + 7
    lgdt level_3_gdt_pointer
    mov $0x38, %eax
    ltr %ax
    mov %rsp, %rax
    push $0x2b              /* ss, rsp, flags with IOPL 3, cs, rip */
    push %rax
    push $0x3002
    push $0x33
    lea 1f(%rip), %rax
    push %rax
    iretq
1:  call *%rdi
2:  jmp 2b

.section .data
    .balign 8
level_3_gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cffb000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
tss_descriptor:
    .quad 0x0000890000002068, 0
level_3_gdt_pointer:
    .word . - level_3_gdt - 1
    .quad level_3_gdt
    .balign 16
tss:
    .fill 102, 1, 0
    .word 104               /* where the bitmap of ports is */
    .fill 8192, 1, 0
    .byte 0                 /* a wide access to the last port looks at bits behind the last */
.section .note.GNU-stack, "", @progbits
